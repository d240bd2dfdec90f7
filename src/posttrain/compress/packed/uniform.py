"""Integer codes with a scale and a zero point a group of columns."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from posttrain.compress.kernels.dispatch import by_panels, few_rows
from posttrain.compress.kernels.library import runs_on, there_for
from posttrain.compress.kernels.uniform import uniform_product, uniform_values
from posttrain.compress.packed.bits import pack, packed_width, unpack
from posttrain.compress.packed.weight import PackedWeight


class UniformWeight(PackedWeight):
    """`w = scale * (code - zero)`, or `scale * code + zero` with a float zero.

    codes: `[out, ceil(in * bits / 8)]` uint8, lowest bits first. scale: `[out, groups]` fp16. zero: integers packed
    like the codes, `[out, ceil(groups * bits / 8)]` uint8; or fp16 `[out, groups]`; or none, and the middle code is 0.
    group_of: `[in]` int16 the group of each column, where groups are not runs of columns.
    """

    format = "uniform"
    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    group_of: Tensor | None

    def __init__(
        self, shape: tuple[int, int], bits: int, groups: int, zero: Literal["none", "integer", "float"], ordered: bool
    ) -> None:
        super().__init__(shape)
        rows, columns = self.shape
        self.bits, self.groups, self.kind, self.ordered = bits, groups, zero, ordered
        self.register_buffer("codes", torch.zeros(rows, packed_width(columns, bits), dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(rows, groups, dtype=torch.float16))
        zeros = {
            "none": None,
            "integer": torch.zeros(rows, packed_width(groups, bits), dtype=torch.uint8),
            "float": torch.zeros(rows, groups, dtype=torch.float16),
        }
        self.register_buffer("zero", zeros[zero])
        self.register_buffer("group_of", torch.zeros(columns, dtype=torch.int16) if ordered else None)

    @classmethod
    def of(
        cls, codes: Tensor, scale: Tensor, zero: Tensor, bits: int, kind: Literal["none", "integer", "float"],
        group_of: Tensor | None = None,
    ) -> UniformWeight:  # fmt: skip
        """From `[out, in]` codes and `[out, groups]` scales and zeros. group_of: see above."""
        made = cls((codes.shape[0], codes.shape[1]), bits, scale.shape[1], kind, group_of is not None)
        made.codes.copy_(pack(codes, bits))
        made.scale.copy_(scale)
        if kind == "integer":
            assert made.zero is not None
            made.zero.copy_(pack(zero, bits))
        elif kind == "float":
            assert made.zero is not None
            made.zero.copy_(zero)
        if group_of is not None:
            assert made.group_of is not None
            made.group_of.copy_(group_of)
        return made

    @classmethod
    def empty(cls, shape: tuple[int, int], **settings: Any) -> UniformWeight:
        return cls(shape, **settings)

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "groups": self.groups, "zero": self.kind, "ordered": self.ordered}

    @property
    def counted_bits(self) -> float:
        rows, columns = self.shape
        beside = {"none": 16, "integer": 16 + self.bits, "float": 32}[self.kind]
        return rows * (columns * self.bits + self.groups * beside) + (16 * columns if self.ordered else 0)

    def unpacked(self) -> Tensor:
        """`[out, in]` uint8 codes."""
        return unpack(self.codes, self.bits, self.shape[1])

    def zeros(self) -> Tensor:
        """`[out, groups]` fp32 zero points, as codes or values."""
        if self.zero is None:
            return torch.full_like(self.scale, float(1 << (self.bits - 1)), dtype=torch.float32)
        return unpack(self.zero, self.bits, self.groups).float() if self.kind == "integer" else self.zero.float()

    def product(self, inputs: Tensor) -> Tensor:
        held = self._buffers  # much sooner found there than as attributes
        if few_rows(inputs, held["codes"]):
            return uniform_product(inputs, **held, bits=self.bits, kind=self.kind)  # type: ignore[arg-type]
        if runs_on(inputs, held["codes"]):
            return by_panels(inputs, self.shape, self.values)
        return super().product(inputs)

    def values(self, rows: slice = slice(None), out: Tensor | None = None) -> Tensor:
        """`[rows, in]` values of some rows, fp32 or in the dtype of `out`: for the CPU, where there are kernels."""
        return uniform_values(
            self.shape[1], self.codes, self.scale, self.zero, self.bits, self.kind, self.group_of, rows=rows, out=out
        )

    def dequantize(self) -> Tensor:
        if there_for(self.codes):
            return self.values()
        codes, scale, zero = self.unpacked().float(), self.scale.float(), self.zeros()
        if self.group_of is None:
            by_group = codes.view(self.shape[0], self.groups, -1)
            scale, zero = scale[:, :, None], zero[:, :, None]
        else:
            index = self.group_of.long()
            by_group, scale, zero = codes, scale[:, index], zero[:, index]
        values = by_group * scale + zero if self.kind == "float" else (by_group - zero) * scale
        return values.reshape(self.shape)
