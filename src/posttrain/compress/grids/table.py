"""Grids that are tables: NF4, FP4 and E2M1 values, times a scale a group that is stored in one of several ways."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from posttrain.compress.grids.grid import Grid, Levels
from posttrain.compress.packed.scales import Kind, Scales, whole_of
from posttrain.compress.packed.table import BOOKS, TableWeight
from posttrain.reward.names import unknown
from posttrain.trajectory import PosttrainError

SIGNED = ("fp4", "e2m1")  # books with a sign bit: what is found for the size holds for both signs
TIES_TO_EVEN = ("e2m1",)  # as floating-point units round; in the others a tie goes to the lower value


@dataclass(frozen=True)
class TableLevels(Levels):
    """scale: `[rows, 1]` as it is stored. fitted: `[rows, 1]` before it was rounded to that. whole: see `Table`."""

    book: str
    scale: Tensor
    fitted: Tensor
    whole: float

    def nearest(self, weight: Tensor) -> Tensor:
        return nearest_entry(weight / self.scale, self.book)

    def values(self, codes: Tensor) -> Tensor:
        return torch.tensor(BOOKS[self.book])[codes] * self.scale


@dataclass(frozen=True)
class Table(Grid):
    """Values of a known table, scaled so that the largest weight of a group takes the largest of them.

    book: `nf4`, `fp4` or `e2m1`. scales: how they are stored, see `Scales`; of `power` the scale is 2 to the power
        floor(log2 max|w|) - floor(log2 largest), as the microscaling formats have it, and larger values are clamped.
    whole: the number that the scales of a matrix share where they do; `settled` finds it.

    Reference: card 000, section 9.
    """

    bits: int = 4
    group: int = 64
    book: str = "nf4"
    scales: Kind = "float"
    whole: float | None = None

    def __post_init__(self) -> None:
        if self.book not in BOOKS:
            raise unknown("table of values", self.book, BOOKS)
        if len(BOOKS[self.book]) != 2**self.bits:
            raise PosttrainError(f"bits is {self.bits}; {self.book} has {len(BOOKS[self.book])} values: bits 4")

    def settled(self, weight: Tensor) -> Table:
        groups = weight.split(self.width(weight.shape[1]), 1)
        return replace(self, whole=whole_of(torch.cat([self._scale(group) for group in groups], 1), self.scales))

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> TableLevels:
        fitted = self._scale(weight)
        whole = whole_of(fitted, self.scales) if self.whole is None else self.whole
        return TableLevels(self.book, Scales.of(fitted, self.scales, whole).values(), fitted, whole)

    def _scale(self, weight: Tensor) -> Tensor:
        """`[rows, 1]`; 1 where all weights are 0."""
        peak, largest = weight.abs().amax(1, keepdim=True), max(BOOKS[self.book])
        found = peak / largest
        if self.scales == "power":
            above = torch.frexp(torch.tensor(largest)).exponent
            found = torch.ldexp(torch.ones_like(peak), torch.frexp(peak).exponent - above)
        return torch.where(peak > 0, found, torch.ones_like(found))

    def pack(self, codes: Tensor, levels: Sequence[Levels], group_of: Tensor | None = None) -> TableWeight:
        found = [each for each in levels if isinstance(each, TableLevels)]
        if group_of is not None:
            raise PosttrainError(f"{self.book} has groups that are runs of columns; expected static groups")
        if len({each.whole for each in found}) > 1:
            raise ValueError("groups of one matrix share a number; fit them with grid.settled(matrix)")
        scales = Scales.of(torch.cat([each.fitted for each in found], 1), self.scales, found[0].whole)
        return TableWeight.of(codes, scales, self.bits, self.book)


def nearest_entry(numbers: Tensor, book: str) -> Tensor:
    """Codes (int64) of the nearest values of a known book."""
    order, middles = _decisions(book)
    sizes = numbers.abs() if book in SIGNED else numbers
    place = torch.bucketize(sizes, middles)
    if book in TIES_TO_EVEN:
        above = torch.bucketize(sizes, middles, right=True)
        place = torch.where((above != place) & (place % 2 == 1), above, place)
    codes = order[place]
    return codes + len(order) * (numbers < 0) if book in SIGNED else codes


@functools.cache
def _decisions(book: str) -> tuple[Tensor, Tensor]:
    """The codes by ascending value (of a signed book those without the sign bit), and the middles between values."""
    values = torch.tensor(BOOKS[book], dtype=torch.float64)
    ascending, order = (values[: len(values) // 2] if book in SIGNED else values).sort()
    return order, ((ascending[1:] + ascending[:-1]) / 2).float()
