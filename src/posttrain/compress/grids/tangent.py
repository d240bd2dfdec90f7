"""Levels that a tangent spreads: dense near 0 and near the largest value, for attention probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.compress.grids.grid import Levels
from posttrain.trajectory import PosttrainError


@dataclass(frozen=True)
class TangentLevels(Levels):
    r"""Codes `round((2^b - 1) f(min(a / A, 1)))` of numbers a from 0 on, with

    .. math:: f(u) = \frac{\tan(\beta(u - c)) - \tan(-\beta c)}{\tan(\beta(1 - c)) - \tan(-\beta c)}

    most: A. centre: c in (0, 1), where levels are the sparsest. slope: β, below `limit(c)`; towards 0 levels become
    evenly spaced. Everything is computed in fp64: the tangent is steep near the limit.

    Reference: DopQ-ViT, 2024, arXiv 2408.03291 (card 028).
    """

    most: float
    centre: float
    slope: float
    bits: int

    def __post_init__(self) -> None:
        if not (self.most > 0 and 0 < self.centre < 1 and 0 < self.slope < limit(self.centre)):
            raise PosttrainError(
                f"a tangent up to {self.most} with centre {self.centre} and slope {self.slope}; expected a largest "
                f"value above 0, a centre between 0 and 1, a slope above 0 and below pi / (2 max(centre, 1 - centre))"
            )

    @property
    def ends(self) -> tuple[float, float]:
        """The tangent at 0 and at 1."""
        return math.tan(-self.slope * self.centre), math.tan(self.slope * (1 - self.centre))

    def nearest(self, weight: Tensor) -> Tensor:
        """The codes that the companded numbers round to, which need not be those of the nearest values."""
        low, high = self.ends
        share = (weight.double() / self.most).clamp(0, 1)
        companded = (torch.tan(self.slope * (share - self.centre)) - low) / (high - low)
        return torch.round((2**self.bits - 1) * companded).to(torch.int64)

    def values(self, codes: Tensor) -> Tensor:
        return self.table().to(codes.device)[codes]

    def table(self) -> Tensor:
        """`[2^b]` fp32: the values of all codes, from exactly 0 to exactly A."""
        low, high = self.ends
        steps = torch.arange(2**self.bits, dtype=torch.float64) / (2**self.bits - 1)
        found = self.most * (torch.atan(low + steps * (high - low)) / self.slope + self.centre)
        found[0], found[-1] = 0.0, self.most
        return found.float()


def limit(centre: float) -> float:
    """The slope at which the tangent becomes infinite at the farther end."""
    return math.pi / (2 * max(centre, 1 - centre))
