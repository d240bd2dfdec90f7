"""Ternary and binary planes against card 133's checks, brute force, and sums by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from posttrain.compress.grids.binary import Binary, binarised
from posttrain.compress.grids.ternary import TernaryPlanes, alternated, assigned, canonical, choices, solved
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.solvers.gptq import GPTQ
from posttrain.compress.solvers.rtn import RoundToNearest, rounded
from posttrain.trajectory import PosttrainError


def normal(rows: int = 256, columns: int = 128, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def student(rows: int = 256, columns: int = 128, seed: int = 0) -> Tensor:
    """Student-t of 4 degrees of freedom."""
    draw = torch.Generator().manual_seed(seed)
    chi = sum(torch.randn(rows, columns, generator=draw, dtype=torch.float64) ** 2 for _ in range(4))
    return torch.randn(rows, columns, generator=draw, dtype=torch.float64) / (chi / 4) ** 0.5


def relative(weight: Tensor, scale: Tensor) -> float:
    values = (scale @ choices(scale.shape[1]).T.to(scale.dtype)).gather(1, assigned(weight, scale))
    return float((values - weight).norm() / weight.norm())


# -- ternary planes ----------------------------------------------------------------------------------------------------


@pytest.mark.limit("ptqtp")
def test_relative_errors_are_those_of_the_card() -> None:
    first = alternated(normal(), 2, 1)
    assert relative(normal(), alternated(normal(), 2, 0)) == pytest.approx(0.488, abs=0.03)
    assert relative(normal(), first) < 0.4
    assert relative(normal(), alternated(normal(), 2)) == pytest.approx(0.166, abs=0.004)
    assert relative(student(), alternated(student(), 2)) == pytest.approx(0.226, abs=0.04)  # its tails differ by sample
    ratio = alternated(normal(), 2)  # of the scales: about 1.5 where the largest value is the sum of both, else 3
    ratio = ratio[:, 0] / ratio[:, 1]
    assert float(ratio.quantile(0.1)) == pytest.approx(1.5, abs=0.1)
    assert float(ratio.quantile(0.9)) == pytest.approx(3.0, abs=0.1)


@pytest.mark.limit("ptqtp")
def test_the_error_never_rises() -> None:
    weight = normal(24)
    errors = [relative(weight, alternated(weight, 2, count, 0.0)) for count in range(30)]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(errors))
    assert errors[-1] < 0.5 * errors[0]


@pytest.mark.limit("ptqtp")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_second_plane_comes_free_of_the_first(dtype: torch.dtype) -> None:
    # both planes start alike, where the system is singular: a scale that stays the first's double is a stuck plane
    scale = alternated(normal(dtype=dtype), 2)
    assert torch.isfinite(scale).all()
    assert ((scale[:, 0] - scale[:, 1]).abs() > 0.01 * scale[:, 0]).float().mean() > 0.95
    assert (scale[:, 1] > 0.1).all()


@pytest.mark.limit("ptqtp")
def test_weights_that_are_sums_of_trits_come_back() -> None:
    draw = torch.Generator().manual_seed(1)
    trits = torch.randint(-1, 2, (32, 2, 64), generator=draw).double()
    true = torch.tensor([[0.75, 0.25]], dtype=torch.float64).repeat(32, 1)
    weight = (true[..., None] * trits).sum(1)
    found = alternated(weight, 2, start=true, ridge=1e-9)
    assert torch.allclose(found, true, atol=1e-6)
    grid = TernaryPlanes(2, 0)
    levels = grid.fit(weight.float())
    again = levels.rounded(weight.float())  # from the usual start
    assert float((again - weight).norm() / weight.norm()) < 0.2


@pytest.mark.limit("ptqtp")
def test_every_weight_has_the_best_of_nine_choices() -> None:
    weight, scale = normal(16), torch.tensor([[0.9, 0.6]], dtype=torch.float64).repeat(16, 1)
    codes = assigned(weight, scale)
    sums = torch.tensor([0.9 * a + 0.6 * b for a, b in choices(2).tolist()], dtype=torch.float64)
    assert torch.allclose((weight - sums[codes]).abs(), (weight[..., None] - sums).abs().amin(-1))


@pytest.mark.limit("ptqtp")
def test_ties_take_the_fewest_trits_and_then_the_first_plane() -> None:
    equal = torch.tensor([[1.0, 1.0]])
    found = choices(2)[assigned(torch.tensor([[1.0, -1.0, 0.0, 2.0, 0.2]]), equal)]
    assert found.tolist() == [[[1, 0], [-1, 0], [0, 0], [1, 1], [0, 0]]]


@pytest.mark.limit("ptqtp")
def test_the_scales_are_those_of_least_squares() -> None:
    weight, draw = normal(8), torch.Generator().manual_seed(0)
    trits = torch.randint(-1, 2, (8, 2, 128), generator=draw).double()
    wanted = torch.linalg.lstsq(trits.transpose(1, 2), weight[..., None]).solution[..., 0]
    assert torch.allclose(solved(trits, weight, 1e-12), wanted, atol=1e-9)
    weights = torch.rand(128, generator=draw, dtype=torch.float64)
    root = weights.sqrt()
    wanted = torch.linalg.lstsq((trits * root).transpose(1, 2), (weight * root)[..., None]).solution[..., 0]
    assert torch.allclose(solved(trits, weight, 1e-12, weights), wanted, atol=1e-9)


@pytest.mark.limit("ptqtp")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_planes_share_the_weight_equally(dtype: torch.dtype) -> None:
    weight = normal(16, dtype=dtype)
    signs = weight.sign()[:, None].expand(-1, 2, -1)
    found = solved(signs, weight, 1e-6)
    assert torch.equal(found[:, 0], found[:, 1])
    assert torch.allclose(found[:, 0], weight.abs().mean(1) / 2, rtol=1e-4)


@pytest.mark.limit("ptqtp")
def test_the_ridge_grows_where_the_system_is_singular() -> None:
    weight = normal(4)
    signs = weight.sign()[:, None].expand(-1, 2, -1)
    found = solved(signs, weight, 1e-16)  # κ about 1e18: λ becomes 1e-16 sqrt(1e18 / 1e12)
    assert torch.isfinite(found).all()
    assert torch.allclose(found.sum(1), weight.abs().mean(1), rtol=0.05)


@pytest.mark.limit("ptqtp")
def test_one_plane_is_ternary_least_squares() -> None:
    # of one plane, the best scale over every threshold: the mean of those above it; brute force over all of them
    weight = normal(12, 40)
    found = alternated(weight, 1, 200, 0.0)
    for row in range(12):
        sizes = weight[row].abs().sort(descending=True).values
        means = [sizes[:k].mean() for k in range(1, 41)]
        errors = [float((weight[row] ** 2).sum() - k * m**2) for k, m in enumerate(means, 1)]
        got = float(((weight[row] - _ternary(weight[row], found[row, 0])) ** 2).sum())
        assert got <= 1.02 * min(errors)
        kept = assigned(weight[row : row + 1], found[row : row + 1]) > 0
        assert float(found[row, 0]) == pytest.approx(float(weight[row].abs()[kept[0]].mean()), rel=1e-6)


def _ternary(weight: Tensor, scale: Tensor) -> Tensor:
    return scale * torch.where(weight.abs() > scale / 2, weight.sign(), torch.zeros_like(weight))


@pytest.mark.limit("ptqtp")
def test_scaling_and_turning_the_weights_scales_and_turns_the_result() -> None:
    weight, grid = normal(32, dtype=torch.float32), TernaryPlanes(2, 0)
    plain = grid.fit(weight)
    scaled = grid.fit(weight * 8)
    assert torch.equal(scaled.scale, plain.scale * 8)
    assert torch.equal(scaled.nearest(weight * 8), plain.nearest(weight))
    assert torch.equal(grid.fit(-weight).rounded(-weight), -plain.rounded(weight))


@pytest.mark.limit("ptqtp")
def test_to_go_on_from_the_result_changes_nothing() -> None:
    weight = normal(32)
    found = alternated(weight, 2, 500, 1e-12)
    assert torch.allclose(alternated(weight, 2, 50, start=found), found, rtol=1e-9)


def test_scales_in_falling_order_give_the_same_values() -> None:
    scale = torch.tensor([[0.25, -1.0], [-2.0, 3.0]])
    assert canonical(scale).tolist() == [[1.0, 0.25], [3.0, 2.0]]
    for one, other in zip(scale, canonical(scale), strict=True):
        values = [sorted((choices(2).float() @ s).tolist()) for s in (one, other)]
        assert values[0] == values[1]


@pytest.mark.limit("ptqtp")
def test_the_size_is_that_of_the_card_but_for_whole_bytes() -> None:
    held = rounded(normal(24, 1280, dtype=torch.float32), TernaryPlanes(2, 128), "w")
    assert held.bits_per_weight == pytest.approx(3.2 + 2 * 16 / 128)
    assert held.bits_per_weight == pytest.approx(2 * math.log2(3) + 2 * 16 / 128, abs=0.031)


@pytest.mark.limit("ptqtp")
def test_it_lies_between_three_and_four_even_bits_and_far_from_two() -> None:
    weight = normal(48, 512, dtype=torch.float32)
    errors = {bits: _error(weight, Uniform(bits, 128)) for bits in (2, 3, 4)}
    assert errors[4] < _error(weight, TernaryPlanes(2, 128)) < errors[3] < 0.5 * errors[2]
    assert _error(weight, TernaryPlanes(3, 128)) < 0.6 * _error(weight, TernaryPlanes(2, 128))


def _error(weight: Tensor, grid: object) -> float:
    return float((rounded(weight, grid, "w").dequantize() - weight).norm() / weight.norm())  # type: ignore[arg-type]


@pytest.mark.parametrize("grid", [TernaryPlanes(2, 32), TernaryPlanes(1, 32), Binary(1, 32), Binary(2, 32)])
@pytest.mark.limit("ptqtp")
def test_what_is_stored_stands_for_the_values_and_those_are_the_nearest(grid: TernaryPlanes | Binary) -> None:
    weight = normal(16, 96, dtype=torch.float32)
    weight[3] = 0.0
    levels = [grid.fit(group) for group in weight.split(32, 1)]
    values = torch.cat([level.rounded(g) for level, g in zip(levels, weight.split(32, 1), strict=True)], 1)
    assert torch.allclose(rounded(weight, grid, "w").dequantize(), values, atol=1e-7)
    codes = torch.arange(3**grid.bits if isinstance(grid, TernaryPlanes) else 2**grid.bits)
    every = levels[0].values(codes.repeat(16, 1))
    best = (weight[:, :32, None] - every[:, None]).abs().amin(-1)
    assert torch.allclose((values[:, :32] - weight[:, :32]).abs(), best, atol=1e-6)


@pytest.mark.limit("ptqtp")
def test_planes_inside_gptq() -> None:
    from posttrain.compress.moments import InputMoments

    moments = InputMoments(96)
    moments.add(torch.eye(96))
    weight, grid = normal(16, 96, dtype=torch.float32), TernaryPlanes(2, 32)
    found = GPTQ(grid, damping=0.0).solve(weight, moments, None, "w").dequantize()
    assert torch.equal(found, RoundToNearest(grid).solve(weight, None, None, "w").dequantize())


def test_planes_that_there_are_not() -> None:
    with pytest.raises(PosttrainError, match="counts ternary planes"):
        TernaryPlanes(4)
    with pytest.raises(PosttrainError, match="counts binary planes"):
        Binary(0)


# -- binary planes -----------------------------------------------------------------------------------------------------


@pytest.mark.limit("billm")
def test_one_binary_plane_by_hand() -> None:
    # mean 1, mean distance 2: -1 and 3
    weight = torch.tensor([[-1.0, 0.0, 1.0, 4.0]])
    levels = Binary().fit(weight)
    assert (levels.offset.item(), levels.scale.item()) == (1.0, 1.5)
    assert levels.rounded(weight).tolist() == [[-0.5, -0.5, 2.5, 2.5]]
    assert Binary(centred=False).fit(weight).scale.item() == 1.5  # mean size 6 / 4


@pytest.mark.limit("billm")
def test_the_second_plane_binarises_what_the_first_left() -> None:
    weight = normal(8, 64, dtype=torch.float32)
    one, two = Binary(1).fit(weight), Binary(2).fit(weight)
    left = weight - one.rounded(weight)
    mean, scale = binarised(left)
    assert torch.allclose(two.offset, one.offset + mean, atol=1e-3)
    assert torch.allclose(two.scale[:, 1:], scale, atol=1e-3)
    assert float((two.rounded(weight) - weight).norm()) < 0.65 * float(left.norm())


@pytest.mark.limit("billm")
def test_binarised_under_a_mask() -> None:
    weight = torch.tensor([[1.0, 100.0, 3.0, -100.0]])
    mean, scale = binarised(weight, torch.tensor([[True, False, True, False]]))
    assert (mean.item(), scale.item()) == (2.0, 1.0)
    mean, scale = binarised(weight, torch.zeros(1, 4, dtype=torch.bool))
    assert (mean.item(), scale.item()) == (0.0, 0.0)


def test_zero_is_no_third_value() -> None:
    levels = Binary().fit(torch.tensor([[-1.0, 0.0, 1.0]]))
    assert levels.rounded(torch.tensor([[0.0]])).item() == levels.scale.item()
