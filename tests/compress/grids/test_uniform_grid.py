"""Uniform grids: hand-computed levels, the errors of card 000, clipping, rows that are constant."""

from __future__ import annotations

import pytest
import torch

from posttrain.compress.grids.uniform import Uniform, Zero
from posttrain.compress.solvers.rtn import rounded
from posttrain.trajectory import PosttrainError


def test_three_numbers_by_hand() -> None:
    # range -1..2 in 2 bits: scale 1, the value 0 has code 1
    levels = Uniform(2, 0, "integer").fit(torch.tensor([[-1.0, 0.4, 2.0]]))
    assert (levels.scale.tolist(), levels.zero.tolist()) == ([[1.0]], [[1.0]])
    codes = levels.nearest(torch.tensor([[-1.0, 0.4, 2.0]]))
    assert codes.tolist() == [[0, 1, 3]]
    assert levels.values(codes).tolist() == [[-1.0, 0.0, 2.0]]


def test_symmetric_levels_by_hand() -> None:
    # max|w| 3 in 2 bits: scale 3 / 1.5 = 2, codes -2..1
    levels = Uniform(2, 0, "none").fit(torch.tensor([[-3.0, 0.5, 1.5]]))
    assert levels.scale.tolist() == [[2.0]]
    assert levels.rounded(torch.tensor([[-3.0, 0.5, 1.5, 9.0]])).tolist() == [[-4.0, 0.0, 2.0, 2.0]]


def test_a_float_zero_by_hand() -> None:
    # range 1..2.5 in 2 bits: scale 0.5 from 1 on; an integer zero would have to hold 0
    levels = Uniform(2, 0, "float").fit(torch.tensor([[1.0, 1.6, 2.5]]))
    assert levels.rounded(torch.tensor([[1.0, 1.6, 2.5]])).tolist() == [[1.0, 1.5, 2.5]]
    assert Uniform(2, 0, "integer").fit(torch.tensor([[1.0, 1.6, 2.5]])).zero.item() == 0


@pytest.mark.limit("rtn")
@pytest.mark.parametrize(
    ("zero", "errors"), [("integer", (0.503, 0.216, 0.101)), ("none", (0.552, 0.239, 0.111))], ids=["asym", "sym"]
)
def test_relative_errors_on_normal_weights_are_those_of_the_card(zero: Zero, errors: tuple[float, ...]) -> None:
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    for bits, expected in zip((2, 3, 4), errors, strict=True):
        found = rounded(weight, Uniform(bits, 128, zero), "w").dequantize()
        assert float((found - weight).norm() / weight.norm()) == pytest.approx(expected, abs=0.003)


@pytest.mark.limit("rtn")
@pytest.mark.parametrize("zero", ["none", "integer", "float"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_what_is_stored_stands_for_the_rounded_values(zero: Zero, bits: int) -> None:
    weight = torch.randn(16, 96, generator=torch.Generator().manual_seed(bits))
    grid = Uniform(bits, 32, zero)
    values = torch.cat([grid.fit(group).rounded(group) for group in weight.split(32, 1)], 1)
    assert torch.equal(rounded(weight, grid, "w").dequantize(), values)


@pytest.mark.limit("rtn")
def test_every_value_is_the_nearest_of_its_levels() -> None:
    weight = torch.randn(8, 32, generator=torch.Generator().manual_seed(3))
    for zero in ("none", "integer", "float"):
        levels = Uniform(3, 0, zero).fit(weight)  # type: ignore[arg-type]
        every = levels.values(torch.arange(8).repeat(8, 1))
        best = (weight[:, :, None] - every[:, None]).abs().amin(-1)
        assert torch.allclose((levels.rounded(weight) - weight).abs(), best, atol=1e-6)


def test_clipping_never_loses_more_by_its_own_measure_and_less_where_a_weight_stands_apart() -> None:
    weight = torch.randn(32, 128, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = 12.0
    plain, clipped = (Uniform(3, 0, "integer", clip).fit(weight).rounded(weight) for clip in ("none", "mse"))
    losses = [((found - weight).abs() ** 2.4).sum(1) for found in (plain, clipped)]
    assert (losses[1] <= losses[0]).all()
    assert losses[1].sum() < 0.95 * losses[0].sum()


def test_clipping_weighs_by_importance() -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    weight[:, 0] = 6.0
    only = torch.zeros(64)
    only[0] = 1.0
    grid = Uniform(2, 0, "integer", "mse")
    weighed, plain = ((grid.fit(weight, w).rounded(weight)[:, 0] - 6.0).abs() for w in (only, None))
    assert (weighed <= plain).all()
    assert weighed.sum() < 0.9 * plain.sum()


@pytest.mark.parametrize("zero", ["none", "integer", "float"])
@pytest.mark.parametrize("clip", ["none", "mse"])
def test_constant_rows(zero: Zero, clip: str) -> None:
    weight = torch.tensor([[0.0], [0.3], [-0.7], [6e-9], [3e4]]).expand(5, 16).contiguous()
    found = Uniform(4, 0, zero, clip).fit(weight).rounded(weight)  # type: ignore[arg-type]
    assert torch.isfinite(found).all()
    assert (found[0] == 0).all()
    close = 0.08 if zero == "none" else 1e-3  # of a symmetric grid the largest positive value is 7 of 7.5 steps
    assert torch.allclose(found[1:3], weight[1:3], rtol=close)
    assert torch.allclose(found[3], weight[3], atol=1e-7)
    assert torch.allclose(found[4], weight[4], rtol=close)


def test_groups_that_do_not_divide_the_columns() -> None:
    with pytest.raises(PosttrainError, match=r"group 128 does not divide the 576 input columns of q; .* 32, 48, 64, "):
        rounded(torch.zeros(1, 576), Uniform(4, 128), "q")
    assert Uniform(4, 0).width(576) == Uniform(4, 1024).width(576) == 576


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_that_there_are_not(bits: int) -> None:
    with pytest.raises(PosttrainError, match="a uniform grid has 1 to 8"):
        Uniform(bits)


def test_a_zero_that_there_is_not() -> None:
    with pytest.raises(PosttrainError, match="expected none, integer or float"):
        Uniform(zero="half")  # type: ignore[arg-type]


def test_groups_that_divide_are_named_where_one_does_not() -> None:
    expected = {32: "8, 16, 32", 96: "8, 16, 24, 32, 48, 96", 20: "2, 4, 5, 10, 20", 512: "8, 16, 32, 64, 128, 256"}
    for columns, fits in expected.items():
        with pytest.raises(
            PosttrainError, match=f"^group 11 does not divide the {columns} .*; that divide it: {fits}$"
        ):
            Uniform(4, 11).width(columns)
    with pytest.raises(PosttrainError, match=r"or 0 for one group a row$"):
        Uniform(4, 11).width(997)
