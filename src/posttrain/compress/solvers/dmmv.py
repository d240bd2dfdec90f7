"""DMMV: codes that make the largest error of a layer's outputs small, in the place of the mean one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.packed.weight import PackedWeight
from posttrain.compress.solvers.gptq import GPTQ
from posttrain.compress.solvers.min_max import Problem, Search, least_violation
from posttrain.compress.solvers.solver import LayerSolver
from posttrain.trajectory import PosttrainError

CHUNK = 1 << 24  # numbers that the ranking of moves may hold at once
Weighting = Literal["none", "norm"]


@dataclass(frozen=True)
class LeastLargestError(LayerSolver):
    r"""Moves single codes, and pairs, of another solver's result: `min_q max_n ω_n |x_n (w - ŵ(q))|`, row by row.

    The scales and zero points stay as that solver left them, and what is stored is in its format.

    start: gives the codes to begin with; a solver of a uniform grid. tokens: at most, a sample of the layer's inputs.
    weighting: `norm` is ω_n = 1/|x_n|, without which a few large tokens decide everything; `none` is 1.
    search: see `Search`.

    Reference: Discrete Optimization of Min-Max Violation, 2025, arXiv 2508.13437 (card 131).
    """

    start: LayerSolver = field(default_factory=GPTQ)
    tokens: int = 2048
    weighting: Weighting = "norm"
    search: Search = field(default_factory=Search)

    def __post_init__(self) -> None:
        if self.weighting not in ("none", "norm"):
            raise PosttrainError(f"weighting is {self.weighting!r}; expected none or norm")
        if self.tokens < 1:
            raise PosttrainError(f"tokens is {self.tokens}; expected at least 1")

    @property
    def keep(self) -> int:
        return max(self.tokens, self.start.keep)

    def check(self, shape: tuple[int, int], name: str) -> None:
        self.start.check(shape, name)

    def solve(self, weight: Tensor, moments: InputMoments | None, bits: float | None, name: str) -> PackedWeight:
        assert moments is not None
        found = self.start.solve(weight, moments, bits, name)
        if not isinstance(found, UniformWeight):
            raise PosttrainError(
                f"{name}: {type(self.start).__name__} gave {found.format} codes; expected uniform ones"
            )
        codes = improved(found, weight, moments.kept[: self.tokens], self.weighting, self.search)
        scale, zero = found.scale.float(), found.zeros()
        return UniformWeight.of(codes, scale, zero, found.bits, found.kind, found.group_of)


def improved(packed: UniformWeight, weight: Tensor, inputs: Tensor, weighting: Weighting, search: Search) -> Tensor:
    """`[out, in]` better codes for `[tokens, in]` inputs. Inputs that are all 0 ask for nothing."""
    sizes = inputs.norm(dim=1)
    inputs, sizes = inputs[sizes > 0], sizes[sizes > 0]
    codes, step = packed.unpacked().long(), packed.scale.float()[:, columns_groups(packed)]
    if not len(inputs):
        return codes
    residual = (packed.dequantize() - weight) @ inputs.T
    weights = 1 / sizes if weighting == "norm" else None
    rows = max(1, CHUNK // (min(search.active or len(inputs), len(inputs)) * inputs.shape[1]))
    top = 2**packed.bits - 1
    parts = zip(step.split(rows), residual.split(rows), codes.split(rows), strict=True)
    return torch.cat([least_violation(Problem(inputs, s, top, weights), r, c, search) for s, r, c in parts])


def columns_groups(packed: UniformWeight) -> Tensor:
    """`[in]` the group of each column."""
    if packed.group_of is not None:
        return packed.group_of.long()
    return torch.arange(packed.shape[1]) // (packed.shape[1] // packed.groups)
