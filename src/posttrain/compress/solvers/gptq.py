"""GPTQ: columns one after the other, each column's rounding error carried to the columns that are still to come."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from posttrain.compress.grids.grid import Grid, Levels
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.weight import PackedWeight
from posttrain.compress.solvers.rtn import with_bits
from posttrain.compress.solvers.solver import LayerSolver
from posttrain.trajectory import PosttrainError


@dataclass(frozen=True)
class GPTQ(LayerSolver):
    r"""Error feedback through the inverse Hessian of the layer's squared output error.

    With `H = 2/n X^T X + λ mean(diag) I` and U the upper Cholesky factor of its inverse, column i is rounded to q_i,
    and `(w_i - q_i)/U_ii · U_i,j` is taken off every later column j.

    grid: the levels; fitted at the start of each group to the weights as corrected by then. damping: λ.
    block: columns between updates of all the rest (speed only).
    act_order: columns by falling diagonal of H; the groups' levels are then fitted to the original weights first
        (static groups), so that the layout stays contiguous.

    Reference: GPTQ, 2022, arXiv 2210.17323 (card 000, section 2).
    """

    grid: Grid = field(default_factory=Uniform)
    damping: float = 0.01
    block: int = 128
    act_order: bool = False

    def check(self, shape: tuple[int, int], name: str) -> None:
        self.grid.width(shape[1], name)

    def solve(self, weight: Tensor, moments: InputMoments | None, bits: float | None, name: str) -> PackedWeight:
        assert moments is not None
        grid = with_bits(self.grid, bits)
        weight, hessian = prepared(weight, moments, name)
        columns = weight.shape[1]
        width, grid = grid.width(columns, name), grid.settled(weight)
        order = torch.argsort(hessian.diag(), descending=True, stable=True) if self.act_order else None
        levels: list[Levels] = []
        if order is not None:
            levels = [grid.fit(group) for group in weight.split(width, 1)]
            weight, hessian = weight[:, order], hessian[order][:, order]
        factor = inverse_factor(hessian, self.damping, name)
        places = list(range(columns)) if order is None else order.tolist()
        codes = torch.zeros(columns, weight.shape[0], dtype=torch.int64)

        def round_column(column: int, now: Tensor, whole: Tensor) -> Tensor:
            place = places[column]
            if order is None and column % width == 0:
                levels.append(grid.fit(whole[:, column : column + width].contiguous()))
            level = levels[place // width]
            found = level.nearest(now)
            codes[place] = found[:, 0]
            return level.values(found)

        feed_back(weight, factor, round_column, self.block, width if order is None and width < columns else 0)
        return grid.pack(codes.T.contiguous(), levels)


def feed_back(
    weight: Tensor,
    factor: Tensor,
    round_column: Callable[[int, Tensor, Tensor], Tensor],
    block: int = 128,
    group: int = 0,
    *,
    within: bool = True,
) -> Tensor:
    """GPTQ's loop: the quantized weight, `[out, in]` fp32.

    factor: U. round_column: of a column's number, its corrected weights `[out, 1]` and all weights corrected so far
    (the columns of its group are up to date); returns the column's values. group: columns that are fitted together:
    blocks end where groups do, so that a group's levels never see stale weights.
    """
    # columns lie one after the other in memory, as they are worked on
    work = weight.T.clone(memory_format=torch.contiguous_format)
    found, whole = torch.empty_like(work), work.T
    diagonal, columns = factor.diag().tolist(), len(work)
    step = min(block, group) if group else block
    if group and group % step:
        step = group
    for start in range(0, columns, step):
        end = min(start + step, columns)
        errors = work.new_empty(end - start, work.shape[1])
        for i in range(start, end):
            found[i] = round_column(i, work[i, :, None], whole)[:, 0]
            error = torch.sub(work[i], found[i], out=errors[i - start]).div_(diagonal[i])
            if within:
                work[i + 1 : end].addcmul_(factor[i, i + 1 : end, None], error[None], value=-1.0)
        work[end:].addmm_(factor[start:end, end:].T, errors, alpha=-1.0)
    return found.T.contiguous()


def prepared(weight: Tensor, moments: InputMoments, name: str) -> tuple[Tensor, Tensor]:
    """Weight and Hessian with dead columns (inputs that were always 0) set to 0 and 1."""
    if moments.count == 0:
        raise PosttrainError(f"{name} met no calibration token; give more text, or skip the layer")
    weight, hessian = weight.clone(), moments.hessian.clone()
    dead = hessian.diag() == 0
    hessian[dead, dead] = 1.0
    weight[:, dead] = 0.0
    return weight, hessian


def inverse_factor(hessian: Tensor, damping: float, name: str) -> Tensor:
    """The upper Cholesky factor U of the damped Hessian's inverse, U^T U = (H + λ mean(diag H) I)^-1, fp32.

    Where fp32 cannot factor it, fp64 does; where that cannot either, the damping grows tenfold until it can, and a
    warning says so.
    """
    mean = float(hessian.diag().mean())
    more = [(torch.float64, max(damping, 1e-4) * 10.0**k) for k in (1, 2, 3)]
    for dtype, extra in ((torch.float32, damping), (torch.float64, damping), *more):
        if extra != damping:
            warnings.warn(f"{name}: the Hessian of its inputs needs a damping of {extra:g}", stacklevel=2)
        damped = hessian.to(dtype) + extra * mean * torch.eye(len(hessian), dtype=dtype)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed and torch.isfinite(upper).all():
            return upper.float()
    raise PosttrainError(f"{name}: the Hessian of its inputs cannot be factored; give more calibration text")
