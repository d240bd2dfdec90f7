"""A sum of ternary planes, each with a scale a group of columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.compress.kernels.dispatch import few_rows
from posttrain.compress.kernels.trits import ternary_product
from posttrain.compress.packed.trits import pack_trits, trit_bytes, unpack_trits
from posttrain.compress.packed.weight import PackedWeight


class TernaryWeight(PackedWeight):
    """`w = sum_k scale_k * trit_k`.

    trits: `[planes, out, ceil(in / 5)]` uint8, five a byte. scale: `[planes, out, groups]` fp16.
    """

    format = "ternary"
    trits: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, int], planes: int, groups: int) -> None:
        super().__init__(shape)
        rows, columns = self.shape
        self.planes, self.groups = planes, groups
        self.register_buffer("trits", torch.zeros(planes, rows, trit_bytes(columns), dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(planes, rows, groups, dtype=torch.float16))

    @classmethod
    def of(cls, trits: Tensor, scale: Tensor) -> TernaryWeight:
        """From `[planes, out, in]` trits and `[planes, out, groups]` scales."""
        made = cls((trits.shape[1], trits.shape[2]), trits.shape[0], scale.shape[2])
        made.trits.copy_(pack_trits(trits))
        made.scale.copy_(scale)
        return made

    @classmethod
    def empty(cls, shape: tuple[int, int], **settings: Any) -> TernaryWeight:
        return cls(shape, **settings)

    def settings(self) -> dict[str, Any]:
        return {"planes": self.planes, "groups": self.groups}

    @property
    def counted_bits(self) -> float:
        rows, columns = self.shape
        return self.planes * rows * (8 * -(-columns // 5) + 16 * self.groups)

    def unpacked(self) -> Tensor:
        """`[planes, out, in]` fp32 trits."""
        return unpack_trits(self.trits, self.shape[1])

    def product(self, inputs: Tensor) -> Tensor:
        if not few_rows(inputs, self.trits):
            return super().product(inputs)
        return ternary_product(inputs, self.trits, self.scale)

    def dequantize(self) -> Tensor:
        trits = self.unpacked().view(self.planes, self.shape[0], self.groups, -1)
        return (trits * self.scale.float()[..., None]).sum(0).reshape(self.shape)
