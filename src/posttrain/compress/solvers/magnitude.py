"""Magnitude pruning: the smallest weights go, whatever their inputs are."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.sparse import stored_as
from posttrain.compress.packed.weight import PackedWeight
from posttrain.compress.solvers.solver import LayerSolver
from posttrain.compress.solvers.sparsity import Across, Sparsity, no_bits


@dataclass(frozen=True)
class Magnitude(LayerSolver):
    """The weights of least |w| go; no data is used.

    sparsity: how many. across: compared with those of their layer, or of their row (output).

    Reference: Han et al., 2015, arXiv 1506.02626.
    """

    sparsity: Sparsity = field(default_factory=Sparsity)
    across: Across = "layer"

    @property
    def uses_data(self) -> bool:
        return False

    def check(self, shape: tuple[int, int], name: str) -> None:
        self.sparsity.check(shape, name)

    def solve(self, weight: Tensor, moments: InputMoments | None, bits: float | None, name: str) -> PackedWeight:
        no_bits(bits, name)
        return self.sparsity.pack(weight, self.sparsity.kept(weight.abs(), self.across), stored_as(weight))
