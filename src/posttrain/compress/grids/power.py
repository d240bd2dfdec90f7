"""Levels that a power function spreads: dense near 0 for exponents below 1."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from posttrain.compress.grids.grid import Grid, Levels
from posttrain.compress.packed.scales import Scales
from posttrain.compress.packed.table import TableWeight
from posttrain.trajectory import PosttrainError

LEAST = 0.2  # exponents below collapse the middle codes
COARSE, FINE = 17, 12  # of the search: exponents looked at, then steps of golden section around the best
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class PowerLevels(Levels):
    """scale: `[rows, 1]`, m as half precision holds it. exponent: a. top: L. Codes are q + L."""

    scale: Tensor
    exponent: float
    top: int

    def nearest(self, weight: Tensor) -> Tensor:
        """The codes that the companded weights round to, which need not be those of the nearest values."""
        return torch.round(companded(weight, self.scale, self.exponent, self.top)).long() + self.top

    def values(self, codes: Tensor) -> Tensor:
        return power_table(self.exponent, self.top)[codes] * self.scale


@dataclass(frozen=True)
class Power(Grid):
    r"""`q = round(L sign(w) (|w| / m)^a)` with m = max|w| of a row (or group) and L = 2^(b-1) - 1, and back by 1/a.

    exponent: a in [0.2, 1.2]; None searches the one that loses least on the whole matrix. a = 1 is the symmetric grid
        of evenly spaced values without the lowest code.

    Reference: NUPES, 2023, arXiv 2308.05600 (card 024).
    """

    bits: int = 4
    group: int = 0
    exponent: float | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise PosttrainError(f"bits is {self.bits}; a power grid has 2 to 8")
        if self.exponent is not None and not LEAST <= self.exponent <= 1.2:
            raise PosttrainError(f"exponent is {self.exponent}; expected {LEAST} to 1.2, or None to search it")

    @property
    def top(self) -> int:
        return int(2 ** (self.bits - 1) - 1)

    def settled(self, weight: Tensor) -> Power:
        if self.exponent is not None:
            return self
        width = self.width(weight.shape[1])
        return replace(self, exponent=least_exponent(weight.reshape(-1, width), self.top))

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> PowerLevels:
        exponent = least_exponent(weight, self.top) if self.exponent is None else self.exponent
        return PowerLevels(peaks(weight), exponent, self.top)

    def pack(self, codes: Tensor, levels: Sequence[Levels], group_of: Tensor | None = None) -> TableWeight:
        found = [each for each in levels if isinstance(each, PowerLevels)]
        if group_of is not None:
            raise PosttrainError("a power grid has groups that are runs of columns; expected static groups")
        if len({each.exponent for each in found}) > 1:
            raise ValueError("the groups of a matrix share one exponent; fit them with grid.settled(matrix)")
        return packed_power(codes, torch.cat([each.scale for each in found], 1), found[0].exponent, self.bits)


def packed_power(codes: Tensor, scale: Tensor, exponent: float, bits: int) -> TableWeight:
    """`[out, in]` codes q + L and `[out, groups]` scales as they are stored, with a table of the 2^bits values."""
    table = torch.zeros(2**bits)
    table[:-1] = power_table(exponent, 2 ** (bits - 1) - 1)
    return TableWeight.of(codes, Scales.of(scale, "half"), bits, table)


def peaks(weight: Tensor) -> Tensor:
    """`[rows, 1]`: m, as half precision holds it; 1 where all weights are 0."""
    found = weight.abs().amax(1, keepdim=True).clamp(max=65504.0).half().float()
    return torch.where(found > 0, found, torch.ones_like(found))


def companded(weight: Tensor, scale: Tensor, exponent: float | Tensor, top: int) -> Tensor:
    """The code before it is rounded, from -L to L."""
    return top * weight.sign() * (weight.abs() / scale).clamp(max=1.0) ** exponent


def power_table(exponent: float, top: int) -> Tensor:
    """`[2 L + 1]` fp32: sign(q) (|q| / L)^(1/a) of q from -L to L."""
    codes = torch.arange(-top, top + 1, dtype=torch.float64) / top
    return (codes.sign() * codes.abs() ** (1.0 / exponent)).float()


def least_exponent(weight: Tensor, top: int) -> float:
    """The exponent in [0.2, 1] that loses least: the best of 17, then by golden section between its neighbours."""
    scale = peaks(weight)
    share, size = (weight.abs() / scale).clamp(max=1.0), scale**2

    def loss(exponent: float) -> float:
        back = (torch.round(top * share**exponent) / top) ** (1.0 / exponent)
        return float((((back - share) ** 2).sum(1, keepdim=True) * size).sum())

    step = (1.0 - LEAST) / (COARSE - 1)
    losses = {LEAST + step * i: 0.0 for i in range(COARSE)}
    losses = {a: loss(a) for a in losses}
    best = min(losses, key=lambda a: losses[a])
    low, high = max(LEAST, best - step), min(1.0, best + step)
    left, right = high - GOLDEN * (high - low), low + GOLDEN * (high - low)
    losses |= {left: loss(left), right: loss(right)}
    for _ in range(FINE):
        if losses[left] < losses[right]:
            high, right = right, left
            left = high - GOLDEN * (high - low)
            losses[left] = loss(left)
        else:
            low, left = left, right
            right = low + GOLDEN * (high - low)
            losses[right] = loss(right)
    return min(losses, key=lambda a: losses[a])
