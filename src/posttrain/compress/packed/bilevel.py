"""Integer codes whose scales and zero points are themselves integer codes, of blocks of rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.compress.packed.bits import pack, packed_width, unpack
from posttrain.compress.packed.outliers import unsigned
from posttrain.compress.packed.weight import PackedWeight


class BilevelWeight(PackedWeight):
    """`w = scale * (code - zero)`, with scale and zero `low + step * code` for `block` rows of a group of columns.

    codes: `[out, ceil(in * bits / 8)]` uint8. seconds: `[2, out, ceil(groups * second / 8)]` uint8, the codes of scales
    and zeros. tables: `[2, 2, ceil(out / block), groups]` fp16, low and step of scales and of zeros. order: `[in]`
    int16 where the columns are stored in another order: the place in the matrix of each stored column.
    """

    format = "bilevel"
    codes: Tensor
    seconds: Tensor
    tables: Tensor
    order: Tensor | None

    def __init__(
        self, shape: tuple[int, int], bits: int, groups: int, second: int, block: int, ordered: bool = False
    ) -> None:
        super().__init__(shape)
        rows, columns = self.shape
        self.bits, self.groups, self.second, self.block = bits, groups, second, block
        self.register_buffer("codes", torch.zeros(rows, packed_width(columns, bits), dtype=torch.uint8))
        self.register_buffer("seconds", torch.zeros(2, rows, packed_width(groups, second), dtype=torch.uint8))
        self.register_buffer("tables", torch.zeros(2, 2, -(-rows // block), groups, dtype=torch.float16))
        self.register_buffer("order", torch.zeros(columns, dtype=torch.int16) if ordered else None)

    @classmethod
    def of(
        cls, codes: Tensor, seconds: Tensor, tables: Tensor, bits: int, second: int, block: int, order: Tensor | None
    ) -> BilevelWeight:
        """From `[out, in]` codes, `[2, out, groups]` codes of scales and zeros, and their tables."""
        groups = seconds.shape[2]
        made = cls((codes.shape[0], codes.shape[1]), bits, groups, second, block, order is not None)
        made.codes.copy_(pack(codes, bits))
        made.seconds.copy_(pack(seconds.reshape(-1, groups), second).view_as(made.seconds))
        made.tables.copy_(tables)
        if order is not None:
            assert made.order is not None
            made.order.copy_(order)
        return made

    @classmethod
    def empty(cls, shape: tuple[int, int], **settings: Any) -> BilevelWeight:
        return cls(shape, **settings)

    def settings(self) -> dict[str, Any]:
        return {
            "bits": self.bits, "groups": self.groups, "second": self.second, "block": self.block,
            "ordered": self.order is not None,
        }  # fmt: skip

    @property
    def counted_bits(self) -> float:
        rows, columns = self.shape
        tables, order = 64 * -(-rows // self.block) * self.groups, 16 * columns if self.ordered else 0
        return rows * (columns * self.bits + 2 * self.groups * self.second) + tables + order

    @property
    def ordered(self) -> bool:
        return self.order is not None

    def scales_and_zeros(self) -> tuple[Tensor, Tensor]:
        """`[out, groups]` fp32 each."""
        rows = self.shape[0]
        codes = unpack(self.seconds.flatten(0, 1), self.second, self.groups).view(2, rows, self.groups).float()
        low, step = self.tables.float().repeat_interleave(self.block, 2)[:, :, :rows].unbind(1)
        scale, zero = (low + step * codes).unbind(0)
        return scale, zero

    def dequantize(self) -> Tensor:
        scale, zero = self.scales_and_zeros()
        codes = unpack(self.codes, self.bits, self.shape[1]).float().view(self.shape[0], self.groups, -1)
        found = ((codes - zero[:, :, None]) * scale[:, :, None]).reshape(self.shape)
        if self.order is None:
            return found
        placed = torch.empty_like(found)
        placed[:, unsigned(self.order)] = found
        return placed
