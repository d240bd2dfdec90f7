"""Levels for attention probabilities: by hand, in limits, and against the figures of card 028."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from posttrain.compress.activations.percentile import Percentile
from posttrain.compress.activations.probabilities import Logarithm, Tangent, error
from posttrain.compress.grids.grid import Levels
from posttrain.compress.grids.logarithm import LogLevels
from posttrain.compress.grids.tangent import TangentLevels, limit
from posttrain.compress.moments import InputMoments
from posttrain.trajectory import PosttrainError

SHAPES = [(0.5, 0.5), (0.8, 0.97), (0.1, 0.9), (0.65, 0.05)]  # centre, and slope as a share of its limit


def tangent(bits: int = 4, centre: float = 0.6, slope: float = 0.9, most: float = 0.7) -> TangentLevels:
    return TangentLevels(most, centre, slope * limit(centre), bits)


def test_powers_of_the_root_of_two_by_hand() -> None:
    # codes of 1, 2^-1/2, 2^-1, between, and of what is nearer to 2^-2 than to 2^-3/2: 3 has the last of 2 bits
    levels = LogLevels(torch.tensor(1.0), 2)
    given = torch.tensor([1.0, 0.70, 0.5, 0.36, 0.28, 0.0, 1.3])
    assert levels.nearest(given).tolist() == [0, 1, 2, 3, 4, 4, 0]
    assert levels.values(torch.arange(5)).tolist() == pytest.approx([1.0, 2**-0.5, 0.5, 2**-1.5, 0.0])
    assert LogLevels(torch.tensor(0.5), 2, root=False).rounded(given).tolist() == [0.5, 0.5, 0.5, 0.5, 0.25, 0.0, 0.5]


@pytest.mark.limit("repquant")
@pytest.mark.parametrize("bits", [2, 3, 4, 6])
@pytest.mark.parametrize("root", [True, False])
def test_a_shift_and_a_scale_by_parity_give_the_powers_of_the_root(bits: int, root: bool) -> None:
    levels, codes = LogLevels(torch.tensor(0.83), bits, root), torch.arange(2**bits + 1)
    torch.testing.assert_close(levels.shifted(codes), levels.values(codes), rtol=1e-6, atol=0.0)
    assert levels.shifted(codes)[-1] == 0


@pytest.mark.limit("dopq-vit")
@pytest.mark.parametrize(("centre", "slope"), SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_tangent_holds_both_ends_rises_and_is_its_table(bits: int, centre: float, slope: float) -> None:
    levels = tangent(bits, centre, slope)
    ends = torch.tensor([0.0, 0.7, 2.0])
    assert levels.rounded(ends).tolist() == pytest.approx([0.0, 0.7, 0.7], abs=0.0, rel=1e-7)
    many = torch.linspace(0, 0.8, 200001)
    codes = levels.nearest(many)
    assert (codes.diff() >= 0).all()
    assert codes.unique().tolist() == list(range(2**bits))
    steps = torch.arange(2**bits, dtype=torch.float64) / (2**bits - 1)
    low, high = math.tan(-levels.slope * centre), math.tan(levels.slope * (1 - centre))
    formula = 0.7 * (torch.atan(steps * (high - low) + low) / levels.slope + centre)
    torch.testing.assert_close(levels.table().double(), formula, atol=1e-7, rtol=1e-6)
    assert torch.equal(levels.values(codes), levels.table()[codes])


@pytest.mark.limit("dopq-vit")
def test_a_tangent_without_slope_is_even_steps() -> None:
    many = torch.linspace(0, 0.7, 501)
    even = torch.round(many / 0.7 * 15) * 0.7 / 15
    found = tangent(slope=1e-4).rounded(many)
    assert ((found - even).abs() < 1e-5).float().mean() > 0.99  # the others are ties
    assert float((tangent(slope=0.9).rounded(many) - even).abs().max()) > 0.01


def test_a_tangent_is_the_finest_at_both_ends() -> None:
    gaps = tangent(5, 0.5, 0.95).table().diff()
    assert gaps[15] > 3 * gaps[0]
    torch.testing.assert_close(gaps[0], gaps[-1], rtol=1e-3, atol=0.0)
    skewed = tangent(5, 0.8, 0.95).table().diff()
    assert skewed[0] < skewed[-1]


def attention(scale: float, seed: int = 0) -> Tensor:
    """softmax(q k^T / 8) of 197 tokens, as in card 028."""
    draw = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 8, 197, 64, generator=draw)
    return (scale * (q @ k.transpose(-1, -2)) / 8).softmax(-1).flatten()


def fitted(part: Percentile | Logarithm | Tangent, values: Tensor) -> float:
    """Mean squared error, times 10^6, after fitting to a sample."""
    moments = InputMoments(1, gram=False, keep=part.keep)
    moments.add(values[:, None])
    return float((part.fit(moments, 1, "a")(values) - values).square().mean()) * 1e6


@pytest.mark.limit("dopq-vit", "repquant")
def test_errors_on_sharp_attention_are_those_of_the_card() -> None:
    """Card 028 measured 4 bits: even 27.3, log2 49.9, log√2 12.6, symmetric tangent 13.2, tangent 7.8; 3 bits: 74.8,
    50.9, 61.7, 51.5, 31.5 (it does not say with which draws, so a fifth of each is allowed).
    """
    values = attention(3.0)
    card = {4: (27.3, 49.9, 12.6, 13.2, 7.8), 3: (74.8, 50.9, 61.7, 51.5, 31.5)}
    for bits, wanted in card.items():
        plain = (Percentile(bits), Logarithm(bits, root=False), Logarithm(bits))
        found = [fitted(part, values) for part in (*plain, Tangent(bits, centre=0.5), Tangent(bits))]
        assert found == pytest.approx(wanted, rel=0.2)


def test_what_is_given_is_not_searched() -> None:
    values = attention(3.0)[:20000]
    moments = InputMoments(1, gram=False, keep=4096)
    moments.add(values[:, None])
    step = Tangent(4, centre=0.3, slope=0.4).fit(moments, 1, "a")
    assert step.shape[1:].tolist() == pytest.approx([0.3, 0.4 * limit(0.3)])
    searched = Tangent(4).fit(moments, 1, "a")
    assert error(searched.levels, moments.kept.flatten()) < error(step.levels, moments.kept.flatten())


@pytest.mark.parametrize("levels", [LogLevels(torch.tensor(0.9), 3), tangent(3)])
def test_rounding_twice_is_rounding_once(levels: Levels) -> None:
    once = levels.rounded(torch.rand(200, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(levels.rounded(once), once)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: TangentLevels(0.0, 0.5, 1.0, 4), "expected a largest value above 0"),
        (lambda: TangentLevels(1.0, 0.5, math.pi, 4), "a slope above 0 and below"),
        (lambda: Tangent(4, centre=1.5), "centre is 1.5; expected a share"),
        (lambda: Tangent(4, slope=0.0), "slope is 0.0; expected a share"),
        (lambda: Logarithm(4, quantiles=(0.3,)), "quantiles are"),
        (lambda: Logarithm(1), "2 to 16"),
        (lambda: Logarithm(4).fit(InputMoments(1), 1, "the key of x"), "the key of x met no calibration token"),
    ],
)
def test_mistakes_are_told(wrong: object, told: str) -> None:
    with pytest.raises(PosttrainError, match=told):
        wrong()  # type: ignore[operator]
