"""Two values a plane: an offset and signs times a scale; further planes binarise what is left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.compress.grids.grid import Grid, Levels
from posttrain.compress.packed.planes import BinaryWeight
from posttrain.trajectory import PosttrainError

PLANES = 4


@dataclass(frozen=True)
class BinaryLevels(Levels):
    """offset: `[rows, 1]`, scale: `[rows, planes]`, as half precision holds them. Bit k of a code is plane k's sign."""

    offset: Tensor
    scale: Tensor

    def nearest(self, weight: Tensor) -> Tensor:
        left, codes = weight - self.offset, torch.zeros(weight.shape, dtype=torch.int64)
        for plane in range(self.scale.shape[1]):
            above = left >= 0  # 0 counts as +: there is no third value
            codes += above.long() << plane
            left = left - signed(above) * self.scale[:, plane : plane + 1]
        return codes

    def values(self, codes: Tensor) -> Tensor:
        planes = range(self.scale.shape[1])
        signs = [signed((codes >> plane) & 1 == 1) * self.scale[:, plane : plane + 1] for plane in planes]
        return torch.stack(signs).sum(0) + self.offset


@dataclass(frozen=True)
class Binary(Grid):
    r"""`w = μ + sum_k α_k sign_k`: plane by plane the mean of what is left, and the mean distance from it.

    bits: planes. centred: α = mean|w - μ|, the best for its μ; otherwise mean|w|, as PTQ1.61 has it.

    Reference: BiLLM, 2024, arXiv 2402.04291 (card 000, section 7); PTQ1.61, 2025, arXiv 2502.13179 (card 032).
    """

    bits: int = 1
    group: int = 0
    centred: bool = True

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= PLANES:
            raise PosttrainError(f"bits is {self.bits}; it counts binary planes, of which there can be 1 to {PLANES}")

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> BinaryLevels:
        left, offset, scales = weight, torch.zeros(len(weight), 1), []
        for _ in range(self.bits):
            mean, scale = binarised(left, centred=self.centred)
            left = left - mean - signed(left >= mean) * scale
            offset = offset + mean
            scales.append(scale)
        return BinaryLevels(half(offset), half(torch.cat(scales, 1)))

    def pack(self, codes: Tensor, levels: Sequence[Levels], group_of: Tensor | None = None) -> BinaryWeight:
        if group_of is not None:
            raise PosttrainError("binary planes have groups that are runs of columns; expected static groups")
        found = [each for each in levels if isinstance(each, BinaryLevels)]
        return BinaryWeight.of(
            torch.stack([(codes >> plane) & 1 for plane in range(self.bits)]),
            torch.stack([each.scale for each in found], -1).transpose(0, 1),
            torch.cat([each.offset for each in found], 1),
            torch.full((len(found),), codes.shape[1] // len(found)),
        )


def binarised(weight: Tensor, mask: Tensor | None = None, *, centred: bool = True) -> tuple[Tensor, Tensor]:
    """Mean and mean distance from it (or mean size), `[rows, 1]` each, of the weights under a mask."""
    if mask is None:
        mean = weight.mean(1, keepdim=True)
        return mean, (weight - mean if centred else weight).abs().mean(1, keepdim=True)
    there = mask.to(weight.dtype)
    count = there.sum(1, keepdim=True).clamp(min=1.0)
    mean = (weight * there).sum(1, keepdim=True) / count
    return mean, ((weight - mean if centred else weight).abs() * there).sum(1, keepdim=True) / count


def signed(positive: Tensor) -> Tensor:
    """1 where true, else -1, fp32."""
    return positive.float() * 2 - 1


def half(numbers: Tensor) -> Tensor:
    """Numbers as half precision holds them, in fp32."""
    return numbers.clamp(-65504.0, 65504.0).half().float()
