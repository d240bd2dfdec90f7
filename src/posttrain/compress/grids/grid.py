"""A grid says which values exist: fitted to a group of columns, it gives every weight its nearest code."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from posttrain.compress.packed.weight import PackedWeight
from posttrain.trajectory import PosttrainError

WIDEST = 256  # columns of a group that is named to one who gave another


class Levels(ABC):
    """The values that the rows of one group of columns may take, with scales already rounded to how they are stored."""

    @abstractmethod
    def nearest(self, weight: Tensor) -> Tensor:
        """`[rows, n]` fp32 -> `[rows, n]` int64 codes of the nearest values; n may be one column of the group."""

    @abstractmethod
    def values(self, codes: Tensor) -> Tensor:
        """`[rows, n]` codes -> `[rows, n]` fp32 values."""

    def rounded(self, weight: Tensor) -> Tensor:
        """`[rows, n]` -> the nearest values."""
        return self.values(self.nearest(weight))


@dataclass(frozen=True)
class Grid(ABC):
    """Scalar values for single weights.

    bits: of a code. group: columns of a row that share levels; 0 for the whole row.
    """

    bits: int = 4
    group: int = 128

    def settled(self, weight: Tensor) -> Grid:
        """The grid with what it takes from a whole `[out, in]` matrix, which all of its groups share: a number that
        their scales are stored against, an exponent. Most take nothing. Solvers that pack call it before they fit.
        """
        return self

    @abstractmethod
    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Levels:
        """Levels for `[rows, n]` weights of one group.

        importance: `[n]` or `[rows, n]`, where errors weigh unequally.
        """

    @abstractmethod
    def pack(self, codes: Tensor, levels: Sequence[Levels], group_of: Tensor | None = None) -> PackedWeight:
        """`[rows, columns]` codes, and levels group by group, as they are stored.

        group_of: `[columns]` the group of each column where groups are not runs of `group` columns (activation order).
        """

    def width(self, columns: int, name: str = "a layer") -> int:
        """Columns of a group in a matrix of `columns`; PosttrainError where groups do not divide it."""
        if self.group == 0 or self.group >= columns:
            return columns
        if columns % self.group:
            fits = [g for g in range(2, min(columns, WIDEST) + 1) if columns % g == 0]
            fits = [g for g in fits if g % 8 == 0] or fits
            hint = f"; that divide it: {', '.join(map(str, fits))}" if fits else ""
            raise PosttrainError(
                f"group {self.group} does not divide the {columns} input columns of {name}; expected a divisor, or 0 "
                f"for one group a row{hint}"
            )
        return self.group
