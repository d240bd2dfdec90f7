"""Round to nearest after a search of how far each group's weights are cut off, by the error of what they multiply."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from posttrain.compress.grids.grid import Grid
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.solvers.rtn import rounded, with_bits
from posttrain.compress.solvers.solver import Solver, checked
from posttrain.compress.structure import structure
from posttrain.compress.walk import Block
from posttrain.trajectory import PosttrainError


@dataclass(frozen=True)
class ClippedRounding(Solver):
    """AWQ's search of clipping: the weights of a group are cut off at m = (1 - i / points) max|w|, i = 0, 1, ... as
    long as a share of 1 - `most` is left, and the m is taken with which the group's part of the output changes least.

    Queries and keys are rounded as they are: their errors multiply, which the search does not see.

    grid: the levels. tokens: drawn evenly from the calibration, on which the change is measured.

    Reference: AWQ, 2023, arXiv 2306.00978 (card 000, section 3).
    """

    grid: Grid = field(default_factory=Uniform)
    points: int = 20
    most: float = 0.5
    tokens: int = 512

    def check(self, shape: tuple[int, int], name: str) -> None:
        self.grid.width(shape[1], name)

    def solve_block(self, block: Block) -> None:
        spared = structure(block).queries_keys
        moments = block.moments([n for n in block.linears if n not in spared], gram=False, keep=self.tokens)
        for name, linear in block.linears.items():
            whole, grid = f"{block.name}.{name}", with_bits(self.grid, block.bits.get(name))
            weight = checked(linear.weight.detach().float(), whole)
            if name in moments:
                weight = clipped(weight, moments[name].kept, grid, whole, self.points, self.most)
            block.install(name, rounded(weight, grid, whole))


def clipped(weight: Tensor, inputs: Tensor, grid: Grid, name: str, points: int = 20, most: float = 0.5) -> Tensor:
    """`[out, in]` the weight with each group of a row cut off where that loses least. inputs: `[tokens, in]`."""
    if not len(inputs):
        raise PosttrainError(f"{name} met no calibration token; give more text, or skip the layer")
    width = grid.width(weight.shape[1], name)
    parts, grid = [], grid.settled(weight)
    for group, met in zip(weight.split(width, 1), inputs.split(width, 1), strict=True):
        gram = met.T @ met / len(met)
        top = group.abs().amax(1, keepdim=True)
        best, least = top, torch.full_like(top, torch.inf)
        for i in range(int(most * points)):
            limit = top * (1 - i / points)
            cut = group.clamp(-limit, limit)
            change = grid.fit(cut).rounded(cut) - group
            error = ((change @ gram) * change).sum(1, keepdim=True)
            best, least = torch.where(error < least, limit, best), torch.minimum(error, least)
        parts.append(group.clamp(-best, best))
    return torch.cat(parts, 1)
