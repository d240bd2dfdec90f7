"""Round to nearest: each weight takes the nearest value of its group's levels."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import Tensor

from posttrain.compress.grids.grid import Grid
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.weight import PackedWeight
from posttrain.compress.solvers.solver import LayerSolver

AnyGrid = TypeVar("AnyGrid", bound=Grid)


@dataclass(frozen=True)
class RoundToNearest(LayerSolver):
    """Each weight takes the nearest value of its group's levels; no data is used.

    Reference: card 000, section 1.
    """

    grid: Grid = field(default_factory=Uniform)

    @property
    def uses_data(self) -> bool:
        return False

    def check(self, shape: tuple[int, int], name: str) -> None:
        self.grid.width(shape[1], name)

    def solve(self, weight: Tensor, moments: InputMoments | None, bits: float | None, name: str) -> PackedWeight:
        return rounded(weight, with_bits(self.grid, bits), name)


def rounded(weight: Tensor, grid: Grid, name: str, importance: Tensor | None = None) -> PackedWeight:
    """A weight rounded to the nearest levels of a grid. importance: `[in]`, for grids that weigh errors."""
    width, grid = grid.width(weight.shape[1], name), grid.settled(weight)
    groups = weight.split(width, 1)
    weights = [None] * len(groups) if importance is None else importance.split(width)
    levels = [grid.fit(group, given) for group, given in zip(groups, weights, strict=True)]
    codes = torch.cat([level.nearest(group) for level, group in zip(levels, groups, strict=True)], 1)
    return grid.pack(codes, levels)


def with_bits(grid: AnyGrid, bits: float | None) -> AnyGrid:
    """The grid with the bits that an allocation gives a layer."""
    return grid if bits is None or bits == grid.bits else replace(grid, bits=round(bits))
