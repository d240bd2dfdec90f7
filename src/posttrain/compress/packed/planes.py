"""A sum of sign planes: an offset and a scale for each plane, a row of a group of columns at a time."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from posttrain.compress.kernels.dispatch import few_rows
from posttrain.compress.kernels.table import GroupScales, table_product
from posttrain.compress.packed.bits import pack, packed_width, unpack
from posttrain.compress.packed.table import group_of
from posttrain.compress.packed.weight import PackedWeight


class BinaryWeight(PackedWeight):
    """`w = column * (offset + sum_k scale_k * sign_k)`.

    signs: `[planes, out, ceil(in / 8)]` uint8, a bit each, 1 for +. scale: `[planes, out, groups]` fp16. offset:
    `[out, groups]` fp16. column: `[in]` fp16 a factor of each column, or none. widths: `[groups]` int32, the columns of
    each group, which are runs.
    """

    format = "binary"
    signs: Tensor
    scale: Tensor
    offset: Tensor
    column: Tensor | None
    widths: Tensor

    def __init__(self, shape: tuple[int, int], planes: int, groups: int, columns: bool = False) -> None:
        super().__init__(shape)
        rows, width = self.shape
        self.planes, self.groups = planes, groups
        self.register_buffer("signs", torch.zeros(planes, rows, packed_width(width, 1), dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(planes, rows, groups, dtype=torch.float16))
        self.register_buffer("offset", torch.zeros(rows, groups, dtype=torch.float16))
        self.register_buffer("column", torch.zeros(width, dtype=torch.float16) if columns else None)
        self.register_buffer("widths", torch.zeros(groups, dtype=torch.int32))

    @classmethod
    def of(
        cls, signs: Tensor, scale: Tensor, offset: Tensor, widths: Tensor, column: Tensor | None = None
    ) -> BinaryWeight:
        """From `[planes, out, in]` bits, and the rest as it is stored."""
        planes, rows, columns = signs.shape
        made = cls((rows, columns), planes, len(widths), column is not None)
        made.signs.copy_(pack(signs.reshape(planes * rows, columns), 1).view(planes, rows, -1))
        made.scale.copy_(scale)
        made.offset.copy_(offset)
        made.widths.copy_(widths)
        if column is not None:
            assert made.column is not None
            made.column.copy_(column)
        return made

    @classmethod
    def empty(cls, shape: tuple[int, int], **settings: Any) -> BinaryWeight:
        return cls(shape, **settings)

    def settings(self) -> dict[str, Any]:
        return {"planes": self.planes, "groups": self.groups, "columns": self.column is not None}

    @property
    def counted_bits(self) -> float:
        rows, columns = self.shape
        factors = 16 * columns if self.column is not None else 0
        a_row = self.planes * (8 * -(-columns // 8) + 16 * self.groups) + 16 * self.groups
        return rows * a_row + factors + 32 * self.groups

    def unpacked(self) -> Tensor:
        """`[planes, out, in]` fp32 signs."""
        rows, columns = self.shape
        bits = unpack(self.signs.flatten(0, 1), 1, columns).view(self.planes, rows, columns)
        return bits.float() * 2 - 1

    def product(self, inputs: Tensor) -> Tensor:
        if not few_rows(inputs, self.signs) or not bool((self.widths == self.widths[0]).all()):
            return super().product(inputs)
        x = inputs.detach().reshape(-1, self.shape[1]).float()
        if self.column is not None:
            x = x * self.column.float()
        found = x.unflatten(1, (self.groups, -1)).sum(-1) @ self.offset.float().T
        levels = _signs(x.device)
        for signs, scale in zip(self.signs, self.scale, strict=True):
            found += table_product(x, signs, levels, GroupScales(scale), 1)
        return found.to(inputs.dtype).view(*inputs.shape[:-1], -1)

    def dequantize(self) -> Tensor:
        scale, offset = self.scale.float(), self.offset.float()
        if self.groups > 1:
            place = group_of(self.widths)
            scale, offset = scale[:, :, place], offset[:, place]
        found = (self.unpacked() * scale).sum(0) + offset
        return found if self.column is None else found * self.column.float()


@functools.cache
def _signs(device: torch.device) -> Tensor:
    """What the bits of a plane stand for."""
    return torch.tensor([-1.0, 1.0], device=device)
