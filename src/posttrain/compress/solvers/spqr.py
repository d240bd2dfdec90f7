"""SpQR: few bits in small groups, and the weights that suffer from them kept in half precision."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from posttrain.compress.grids.bilevel import Bilevel, BilevelLevels
from posttrain.compress.grids.binary import half
from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.outliers import WithOutliers
from posttrain.compress.packed.weight import PackedWeight
from posttrain.compress.solvers.gptq import feed_back, inverse_factor, prepared
from posttrain.compress.solvers.rtn import with_bits
from posttrain.compress.solvers.solver import LayerSolver
from posttrain.trajectory import PosttrainError


@dataclass(frozen=True)
class SpQR(LayerSolver):
    r"""GPTQ in order of activation on groups of 16, with outliers.

    A weight's error counts as `((w - ŵ)/U_jj)^2`, U as in GPTQ. Weights whose absence spares their group more than the
    threshold do not take part in fitting its levels; weights whose own error is above it are stored beside the codes
    and leave no error to carry on.

    grid: the levels. threshold: as a share of the mean over columns of var(w_j)/U_jj^2. damping: λ of GPTQ.

    Reference: SpQR, 2023, arXiv 2306.03078 (card 000, section 6).
    """

    grid: Bilevel = field(default_factory=Bilevel)
    threshold: float = 0.2
    damping: float = 1.0
    block: int = 128

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise PosttrainError(f"threshold is {self.threshold}; expected a positive share (inf for no outliers)")

    def check(self, shape: tuple[int, int], name: str) -> None:
        self.grid.width(shape[1], name)

    def solve(self, weight: Tensor, moments: InputMoments | None, bits: float | None, name: str) -> PackedWeight:
        assert moments is not None
        grid = with_bits(self.grid, bits)
        assert isinstance(grid, Bilevel)
        weight, hessian = prepared(weight, moments, name)
        width = grid.width(weight.shape[1], name)
        order = torch.argsort(hessian.diag(), descending=True, stable=True)
        weight, hessian = weight[:, order], hessian[order][:, order]
        factor = inverse_factor(hessian, self.damping, name)
        diagonal = factor.diag()
        limit = self.threshold * float((weight.var(0, correction=min(1, len(weight) - 1)) / diagonal**2).mean())
        codes, kept = torch.zeros(weight.shape, dtype=torch.int64), torch.zeros_like(weight)
        outliers = torch.zeros(weight.shape, dtype=torch.bool)
        levels: list[BilevelLevels] = []

        def round_column(column: int, now: Tensor, whole: Tensor) -> Tensor:
            if column % width == 0:
                group = slice(column, column + width)
                levels.append(grid.fit(without_outliers(whole[:, group], diagonal[group], limit, 2**grid.bits - 1)))
            found = levels[-1].nearest(now)
            values = levels[-1].values(found)
            far = ((now - values) / diagonal[column]) ** 2 > limit
            values = torch.where(far, half(now), values)
            codes[:, column], outliers[:, column], kept[:, column] = found[:, 0], far[:, 0], values[:, 0]
            return values

        feed_back(weight, factor, round_column, self.block, width if width < weight.shape[1] else 0)
        mask, values = torch.zeros_like(outliers), torch.zeros_like(kept)
        mask[:, order], values[:, order] = outliers, kept
        return WithOutliers.of(grid.pack_ordered(codes, levels, order), mask, values)


def without_outliers(group: Tensor, diagonal: Tensor, limit: float, top: int) -> Tensor:
    """`[rows, n]` weights with those that are likely outliers replaced by the mean of the row's others."""
    fits = leave_one_out_gain(group, diagonal, top) <= limit
    mean = (group * fits).sum(1, keepdim=True) / fits.sum(1, keepdim=True).clamp(min=1)
    return torch.where(fits, group, mean)


def leave_one_out_gain(group: Tensor, diagonal: Tensor, top: int) -> Tensor:
    """`[rows, n]`: how much less error the group has when a weight takes part neither in its range nor in the sum.

    diagonal: `[n]` U_jj of its columns. The levels are evenly spaced, on a range that holds 0, with a float zero.
    """
    low, high = _others(group, largest=False).clamp(max=0.0), _others(group, largest=True).clamp(min=0.0)
    all_low, all_high = group.amin(1, keepdim=True).clamp(max=0.0), group.amax(1, keepdim=True).clamp(min=0.0)
    whole = _errors(group, all_low, all_high, diagonal, top).sum(1, keepdim=True)
    others = _errors(group[:, None], low[..., None], high[..., None], diagonal, top)
    return whole - others.sum(-1) + others.diagonal(dim1=1, dim2=2)


def _errors(weight: Tensor, low: Tensor, high: Tensor, diagonal: Tensor, top: int) -> Tensor:
    scale = ((high - low) / top).clamp(min=1e-12)
    codes = torch.round((weight - low) / scale).clamp(0, top)
    return ((codes * scale + low - weight) / diagonal) ** 2


def _others(group: Tensor, *, largest: bool) -> Tensor:
    """`[rows, n]` the extreme of the other weights of the row."""
    ends, places = group.topk(min(2, group.shape[1]), dim=1, largest=largest)
    is_end = torch.arange(group.shape[1], device=group.device) == places[:, :1]
    return torch.where(is_end, ends[:, -1:], ends[:, :1])
