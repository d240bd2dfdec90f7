"""CPTQuant: bits by the sensitivity of layers, at a given mean."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor, nn

from posttrain.compress.allocate.allocation import Allocation
from posttrain.compress.allocate.budget import Priced, in_tiers, within_budget
from posttrain.compress.allocate.sensitivity import Correlation, Layer, Score, layers
from posttrain.compress.calls import Batch
from posttrain.compress.grids.grid import Grid
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.solvers.rtn import rounded
from posttrain.compress.stacks import Stack
from posttrain.trajectory import PosttrainError

Rule = Literal["budget", "tiers"]
LEAST = 0.05  # of the largest sensitivity: what a layer counts for at least, since a measured 0 may be chance


@dataclass(frozen=True)
class BySensitivity(Allocation):
    r"""More bits to layers that the model is more sensitive to.

    score: the sensitivities σ. mean: bits a weight on average, under the rule `budget`: the bits that minimise
    `Σ σ_l err_l(b_l)`, with `err_l(b) = |W_l - RTN_b(W_l)|² / |W_l|²` on `grid`. choices: bits a layer may have.
    tiers: under the rule `tiers`, the bits of the most sensitive part of the layers, of the next, ...
    backwards: for comparison, the most sensitive layer takes the place of the least sensitive one, and so on.

    Reference: CPTQuant, 2024, arXiv 2412.03599 (card 137).
    """

    score: Score = field(default_factory=Correlation)
    mean: float = 4.0
    rule: Rule = "budget"
    choices: tuple[int, ...] = (2, 3, 4, 6, 8)
    tiers: tuple[int, ...] = (8, 6, 4)
    grid: Grid = field(default_factory=Uniform)
    backwards: bool = False

    def __post_init__(self) -> None:
        if self.rule not in ("budget", "tiers"):
            raise PosttrainError(f"rule is {self.rule!r}; expected budget or tiers")

    def bits(
        self, model: nn.Module, stacks: Sequence[Stack], batches: Sequence[Batch], skip: Sequence[str]
    ) -> dict[str, float]:
        units = layers(stacks, skip, self.score.unit)
        found = self.score.sensitivity(model, units, batches)
        sensitivity = [found[unit.name] for unit in units]
        if self.backwards:
            sensitivity = backwards(sensitivity)
        chosen = self.chosen(units, sensitivity)
        return {name: float(b) for unit, b in zip(units, chosen, strict=True) for name in unit.modules}

    def chosen(self, units: Sequence[Layer], sensitivity: Sequence[float]) -> list[int]:
        """Each layer's bits."""
        if self.rule == "tiers":
            return in_tiers(sensitivity, self.tiers)
        top = max(sensitivity)
        shares = [max(s, LEAST * top) if top > 0 else 1.0 for s in sensitivity]
        return within_budget(
            [
                Priced(unit.weights, {b: share * relative_error(unit, self.grid, b) for b in self.choices})
                for unit, share in zip(units, shares, strict=True)
            ],
            self.mean,
        )


def relative_error(unit: Layer, grid: Grid, bits: int) -> float:
    """`|W - RTN(W)|² / |W|²` over the matrices of a layer."""
    lost = whole = 0.0
    for name, module in unit.modules.items():
        weight = module.weight.detach().float()
        lost += float((to_nearest(weight, grid, bits, name) - weight).square().sum())
        whole += float(weight.square().sum())
    return lost / max(whole, 1e-30)


def to_nearest(weight: Tensor, grid: Grid, bits: int, name: str = "a layer") -> Tensor:
    """A weight rounded to the nearest value of a grid with so many bits."""
    return rounded(weight.float(), replace(grid, bits=bits), name).dequantize().to(weight.dtype)


def backwards(sensitivity: Sequence[float]) -> list[float]:
    """The same values with their order turned around: the largest stands where the smallest did."""
    order = sorted(range(len(sensitivity)), key=lambda i: sensitivity[i])
    found = [0.0] * len(order)
    for low, high in zip(order, reversed(order), strict=True):
        found[low] = sensitivity[high]
    return found
