"""The grid of eight-bit floating-point numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.compress.grids.grid import Grid, Levels
from posttrain.compress.packed.float8 import DTYPES, Float8Weight, Kind
from posttrain.trajectory import PosttrainError


@dataclass(frozen=True)
class Float8Levels(Levels):
    """scale: `[rows, 1]` fp32."""

    scale: Tensor
    kind: Kind

    def nearest(self, weight: Tensor) -> Tensor:
        dtype = DTYPES[self.kind]
        largest = torch.finfo(dtype).max
        return (weight / self.scale).clamp(-largest, largest).to(dtype).view(torch.uint8).long()

    def values(self, codes: Tensor) -> Tensor:
        return codes.to(torch.uint8).view(DTYPES[self.kind]).float() * self.scale


@dataclass(frozen=True)
class Float8(Grid):
    """E4M3 (up to 448) or E5M2 (up to 57344) numbers, scaled so that the largest weight of a group takes the largest.

    Rounds to nearest, ties to even. Its scale is fp32: 8 + 32/g bits a weight.
    """

    bits: int = 8
    group: int = 0
    kind: Kind = "e4m3"

    def __post_init__(self) -> None:
        if self.bits != 8:
            raise PosttrainError(f"bits is {self.bits}; an FP8 number has 8")
        if self.kind not in DTYPES:
            raise PosttrainError(f"FP8 format is {self.kind!r}; expected {' or '.join(DTYPES)}")

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Float8Levels:
        scale = weight.abs().amax(1, keepdim=True) / torch.finfo(DTYPES[self.kind]).max
        return Float8Levels(torch.where(scale > 0, scale, torch.ones_like(scale)), self.kind)

    def pack(self, codes: Tensor, levels: Sequence[Levels], group_of: Tensor | None = None) -> Float8Weight:
        if group_of is not None:
            raise PosttrainError("FP8 has groups that are runs of columns; expected static groups")
        scale = torch.cat([each.scale for each in levels if isinstance(each, Float8Levels)], 1)
        return Float8Weight.of(codes, scale, self.kind)
