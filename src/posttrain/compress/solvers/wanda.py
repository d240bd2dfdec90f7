"""Wanda: weights go whose size times that of their inputs is smallest; those that stay are left as they are."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.sparse import stored_as
from posttrain.compress.packed.weight import PackedWeight
from posttrain.compress.solvers.solver import LayerSolver
from posttrain.compress.solvers.sparsity import Across, Sparsity, no_bits
from posttrain.compress.walk import Block
from posttrain.trajectory import PosttrainError


@dataclass(frozen=True)
class Wanda(LayerSolver):
    """The weights of least `|w_ij| * ||X_j||_2` go, X_j input j over all calibration tokens.

    sparsity: how many. across: compared with those of their row (output), as in the paper, or of their layer.
    sequential: the paper looks at all inputs of a block before any of it is pruned.

    Reference: Wanda, 2023, arXiv 2306.11695.
    """

    sparsity: Sparsity = field(default_factory=Sparsity)
    across: Across = "row"
    sequential: bool = field(default=False, kw_only=True)

    def check(self, shape: tuple[int, int], name: str) -> None:
        self.sparsity.check(shape, name)

    def statistics(self, block: Block, stage: list[str]) -> dict[str, InputMoments]:
        return block.moments(stage, gram=False)

    def solve(self, weight: Tensor, moments: InputMoments | None, bits: float | None, name: str) -> PackedWeight:
        no_bits(bits, name)
        assert moments is not None
        if moments.count == 0:
            raise PosttrainError(f"{name} met no calibration token; give more text, or skip the layer")
        score = weight.abs() * moments.norm
        return self.sparsity.pack(weight, self.sparsity.kept(score, self.across), stored_as(weight))
