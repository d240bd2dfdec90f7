"""SparseGPT: GPTQ's error feedback, where rounding a weight is taking it away."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.sparse import stored_as
from posttrain.compress.packed.weight import PackedWeight
from posttrain.compress.solvers.gptq import feed_back, inverse_factor, prepared
from posttrain.compress.solvers.solver import LayerSolver
from posttrain.compress.solvers.sparsity import Sparsity, no_bits
from posttrain.trajectory import PosttrainError


@dataclass(frozen=True)
class SparseGPT(LayerSolver):
    r"""Of each block of columns the weights of least `w^2 / U_jj^2` go, and later columns make up for them.

    U as in GPTQ. Scores are those of the weights as corrected when the block begins, compared over all rows of it, so
    that rows may be pruned unequally; with a pattern N:M, the M columns are chosen among when the first of them comes.

    sparsity: how many. damping: λ of GPTQ. block: columns that are compared.

    Reference: SparseGPT, 2023, arXiv 2301.00774.
    """

    sparsity: Sparsity = field(default_factory=Sparsity)
    damping: float = 0.01
    block: int = 128

    def __post_init__(self) -> None:
        every = self.sparsity.every
        if self.block < 1 or (every is not None and self.block % every[1]):
            expected = f"a multiple of {every[1]}, for {self.sparsity.pattern}" if every else "at least 1 column"
            raise PosttrainError(f"block is {self.block}; expected {expected}")

    def check(self, shape: tuple[int, int], name: str) -> None:
        self.sparsity.check(shape, name)

    def solve(self, weight: Tensor, moments: InputMoments | None, bits: float | None, name: str) -> PackedWeight:
        no_bits(bits, name)
        assert moments is not None
        dtype = stored_as(weight)
        weight, hessian = prepared(weight, moments, name)
        factor = inverse_factor(hessian, self.damping, name)
        diagonal, width = factor.diag(), self.sparsity.every[1] if self.sparsity.every else self.block
        kept = torch.ones(weight.shape, dtype=torch.bool)

        def round_column(column: int, now: Tensor, whole: Tensor) -> Tensor:
            if column % width == 0:
                group = slice(column, column + width)
                kept[:, group] = self.sparsity.kept((whole[:, group] / diagonal[group]) ** 2, "layer")
            return torch.where(kept[:, column : column + 1], now, torch.zeros_like(now))

        found = feed_back(weight, factor, round_column, self.block)
        return self.sparsity.pack(found, kept, dtype)
