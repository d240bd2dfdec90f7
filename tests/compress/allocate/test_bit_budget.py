"""Bits at a given mean: against trying everything, the budget kept, equals treated alike."""

from __future__ import annotations

import itertools

import pytest
import torch

from posttrain.compress.allocate.budget import Priced, in_tiers, within_budget
from posttrain.trajectory import PosttrainError

CHOICES = (2, 3, 4, 6, 8)


def convex(seed: int, weights: list[int]) -> list[Priced]:
    """Losses that fall fourfold with each bit, times a random sensitivity."""
    draw = torch.Generator().manual_seed(seed)
    return [
        Priced(n, {b: float(s) * 4.0**-b for b in CHOICES})
        for n, s in zip(weights, torch.rand(len(weights), generator=draw) + 0.01, strict=True)
    ]


def total(layers: list[Priced], bits: tuple[int, ...]) -> float:
    return sum(layer.losses[b] for layer, b in zip(layers, bits, strict=True))


def size(layers: list[Priced], bits: tuple[int, ...]) -> int:
    return sum(layer.weights * b for layer, b in zip(layers, bits, strict=True))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("price", [1e-4, 1e-3, 1e-2])
def test_it_is_the_lagrangian_solution_and_no_other_of_that_size_loses_less(seed: int, price: float) -> None:
    layers = convex(seed, [3, 5, 2, 4, 3])
    priced = tuple(min(CHOICES, key=lambda b, x=x: x.losses[b] + price * x.weights * b) for x in layers)
    used = size(layers, priced)
    found = tuple(within_budget(layers, used / 17))
    assert found == priced
    every = itertools.product(CHOICES, repeat=5)
    assert total(layers, found) == pytest.approx(min(total(layers, b) for b in every if size(layers, b) <= used))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("mean", [2.0, 2.7, 3.5, 4.0, 5.5, 8.0])
def test_the_budget_is_kept_to_within_one_layer(seed: int, mean: float) -> None:
    weights = [300, 500, 200, 400, 300, 250]
    layers = convex(seed, weights)
    found = within_budget(layers, mean)
    used = size(layers, tuple(found))
    assert used <= mean * sum(weights) + 1e-6
    assert used > mean * sum(weights) - 2 * max(weights) or all(b == 8 for b in found)  # one step is two bits at most


@pytest.mark.parametrize("mean", [2, 3, 4, 6, 8])
def test_equal_layers_get_equal_bits(mean: int) -> None:
    assert within_budget([Priced(7, {b: 4.0**-b for b in CHOICES})] * 5, mean) == [mean] * 5


def test_the_more_sensitive_layer_has_no_fewer_bits() -> None:
    layers = [Priced(10, {b: s * 4.0**-b for b in CHOICES}) for s in (1.0, 50.0, 0.01, 5.0)]
    found = within_budget(layers, 4)
    assert found[1] >= found[3] >= found[0] >= found[2]
    assert found[1] > found[2]


def test_options_off_the_convex_hull_are_never_taken() -> None:
    # 3 bits save hardly anything over 2, so two steps of one bit are worse than one of two
    bent = Priced(1, {2: 1.0, 3: 0.99, 4: 0.1})
    for mean in (2.0, 3.0, 4.0):
        assert all(b != 3 for b in within_budget([bent] * 4, mean))


def test_bits_that_gain_nothing_are_not_spent() -> None:
    assert within_budget([Priced(1, {2: 0.0, 4: 0.0, 8: 0.0})], 8) == [2]


def test_a_budget_below_the_fewest_bits_is_refused() -> None:
    with pytest.raises(PosttrainError, match=r"a mean of 1\.5 bits is less than the fewest"):
        within_budget(convex(0, [1, 2]), 1.5)


def test_tiers_are_thirds_by_sensitivity() -> None:
    assert in_tiers([0.1, 0.9, 0.5, 0.3, 0.8, 0.2], (8, 6, 4)) == [4, 8, 6, 6, 8, 4]
    assert in_tiers([0.1, 0.9], (8, 6, 4)) == [6, 8]
