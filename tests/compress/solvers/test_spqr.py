"""SpQR: GPTQ on its own grid where nothing is an outlier, leave-one-out gains by brute force, what is kept."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from posttrain.compress.grids.bilevel import Bilevel
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.bilevel import BilevelWeight
from posttrain.compress.packed.outliers import WithOutliers
from posttrain.compress.solvers.gptq import GPTQ, feed_back, inverse_factor
from posttrain.compress.solvers.rtn import rounded
from posttrain.compress.solvers.spqr import SpQR, leave_one_out_gain, without_outliers
from posttrain.trajectory import PosttrainError

pytestmark = pytest.mark.limit("spqr")


def normal(rows: int = 48, columns: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def inputs(columns: int = 64, tokens: int = 300) -> Tensor:
    draw = torch.Generator().manual_seed(9)
    return torch.randn(tokens, 16, generator=draw) @ torch.randn(16, columns, generator=draw) + 0.3 * torch.randn(
        tokens, columns, generator=draw
    )


def moments(x: Tensor) -> InputMoments:
    found = InputMoments(x.shape[1])
    found.add(x)
    return found


def loss(weight: Tensor, found: Tensor, x: Tensor) -> float:
    return float((((weight - found) @ x.T) ** 2).sum() / ((weight @ x.T) ** 2).sum())


def test_without_outliers_it_is_gptq_on_its_grid() -> None:
    weight, x, grid = normal(), inputs(), Bilevel()
    found = SpQR(grid, math.inf).solve(weight, moments(x), None, "w")
    assert isinstance(found, BilevelWeight)
    order = moments(x).hessian.diag().argsort(descending=True, stable=True)
    sorted_weight, levels = weight[:, order], []

    def round_column(column: int, now: Tensor, whole: Tensor) -> Tensor:
        if column % 16 == 0:
            levels.append(grid.fit(whole[:, column : column + 16]))
        return levels[-1].rounded(now)

    factor = inverse_factor(moments(x).hessian[order][:, order], 1.0, "w")
    wanted = torch.empty_like(weight)
    wanted[:, order] = feed_back(sorted_weight, factor, round_column, 128, 16)
    assert torch.allclose(found.dequantize(), wanted, atol=1e-6)


def test_its_grid_with_many_bits_for_scales_is_the_even_grid_with_a_float_zero() -> None:
    weight = normal()
    weight[:, 0], weight[:, 1] = -4.0, 4.0  # both signs in every group, so that the ranges are alike
    low, high = weight[:, :16].amin(1, keepdim=True), weight[:, :16].amax(1, keepdim=True)
    scale = (high - low) / 7
    wanted = torch.round((weight[:, :16] - low) / scale) * scale + low
    found = Bilevel(3, 16, second=8, block=1).fit(weight[:, :16]).rounded(weight[:, :16])
    assert float((found - wanted).abs().max()) < 0.02


def test_scales_and_zeros_are_those_of_three_bits_a_block_of_rows() -> None:
    held = rounded(normal(40, 64), Bilevel(), "w")
    assert isinstance(held, BilevelWeight)
    for numbers in held.scales_and_zeros():
        for block in numbers.split(16):
            for group in block.T:
                steps = group.unique()
                assert len(steps) <= 8
    codes = rounded(normal(40, 64), Bilevel(), "w").dequantize()
    levels = [Bilevel().fit(group) for group in normal(40, 64).split(16, 1)]
    values = torch.cat([level.rounded(g) for level, g in zip(levels, normal(40, 64).split(16, 1), strict=True)], 1)
    assert torch.allclose(codes, values, atol=1e-6)


def test_the_gain_of_leaving_one_out_by_brute_force() -> None:
    group, diagonal = normal(6, 8), torch.rand(8, generator=torch.Generator().manual_seed(1)) + 0.5

    def error(row: Tensor, kept: list[int]) -> float:
        low, high = min(float(row[kept].min()), 0.0), max(float(row[kept].max()), 0.0)
        scale = (high - low) / 7
        near = torch.round((row[kept] - low) / scale).clamp(0, 7) * scale + low
        return float((((near - row[kept]) / diagonal[kept]) ** 2).sum())

    found = leave_one_out_gain(group, diagonal, 7)
    for row in range(6):
        whole = error(group[row], list(range(8)))
        for left in range(8):
            kept = [i for i in range(8) if i != left]
            assert float(found[row, left]) == pytest.approx(whole - error(group[row], kept), abs=1e-4)


def test_a_weight_that_stands_apart_takes_no_part_in_the_range() -> None:
    group = (normal(4, 16) * 0.1).clamp(-0.15, 0.15)
    group[:, 5] = 30.0
    found = without_outliers(group, torch.ones(16), 0.2, 7)
    others = torch.cat([group[:, :5], group[:, 6:]], 1)
    assert torch.allclose(found[:, 5], others.mean(1), atol=1e-6)
    assert torch.equal(torch.cat([found[:, :5], found[:, 6:]], 1), others)


def test_large_weights_are_kept_and_about_one_in_a_hundred() -> None:
    weight, x = normal(96, 128), inputs(128)
    weight[::8, 3] = 9.0
    held = SpQR().solve(weight, moments(x), None, "w")
    assert isinstance(held, WithOutliers)
    assert 0.003 < held.count / weight.numel() < 0.04
    kept = torch.zeros(96, dtype=torch.int64)
    columns = held.columns.tolist()
    ends = [0, *held.a_row.long().cumsum(0).tolist()]
    for row in range(96):
        kept[row] = 3 in columns[ends[row] : ends[row + 1]]
    assert kept[::8].float().mean() > 0.9
    assert held.stored_bytes * 8 == pytest.approx(held.counted_bits, rel=0.03)
    assert held.bits_per_weight == pytest.approx(
        3.625 + 32 * held.count / weight.numel() + 16 / 96 + 16 / 128, rel=0.02
    )


def test_outliers_make_up_for_heavy_tails() -> None:
    draw = torch.Generator().manual_seed(3)
    weight, x = normal(64, 64) / torch.rand(64, 64, generator=draw).clamp(min=0.05), inputs()
    with_them, without = (SpQR(threshold=t).solve(weight, moments(x), None, "w") for t in (0.2, math.inf))
    assert loss(weight, with_them.dequantize(), x) < 0.5 * loss(weight, without.dequantize(), x)


def test_three_bits_in_small_groups_are_better_than_large_ones() -> None:
    weight, x = normal(96, 128), inputs(128)
    small = SpQR(damping=0.01).solve(weight, moments(x), None, "w")
    plain = GPTQ(Uniform(3, 128), act_order=True).solve(weight, moments(x), None, "w")
    assert loss(weight, small.dequantize(), x) < 0.6 * loss(weight, plain.dequantize(), x)


def test_a_layer_may_have_other_bits() -> None:
    held = SpQR(threshold=math.inf).solve(normal(), moments(inputs()), 2.0, "w")
    assert isinstance(held, BilevelWeight)
    assert held.bits == 2


def test_a_single_row_and_dead_columns() -> None:
    x = inputs()
    x[:, 7] = 0.0
    found = SpQR().solve(normal(1), moments(x), None, "w").dequantize()
    assert torch.isfinite(found).all()
    assert abs(float(found[0, 7])) < 0.5


def test_a_threshold_that_there_is_not() -> None:
    with pytest.raises(PosttrainError, match="expected a positive share"):
        SpQR(threshold=0.0)
