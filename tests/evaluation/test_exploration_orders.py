from __future__ import annotations

import itertools

import pytest

from conftest import make_model, make_tokenizer
from posttrain.evaluation.novelty import exploration_orders, picks_at_random, picks_to_right, verifier_efficiency
from posttrain.models.causal import CausalPolicy
from posttrain.trajectory import PosttrainError
from scored_groups import scored


def test_looks_until_one_is_right() -> None:
    assert picks_to_right([False, True, False], [2, 0, 1]) == 3
    assert picks_to_right([False, True, True], [2, 0, 1]) == 1
    assert picks_to_right([False, False], [0, 1]) is None


def test_looks_in_a_random_order_on_average() -> None:
    correct = [True, False, False, True, False]
    orders = list(itertools.permutations(range(5)))
    mean = sum(picks_to_right(correct, order) or 0 for order in orders) / len(orders)
    assert picks_at_random(correct) == pytest.approx(mean)
    assert picks_at_random([False]) is None


def test_efficiency_is_the_share_of_looks_saved() -> None:
    correct = [[True, False, False], [False, False, False], [False, True, False]]
    assert verifier_efficiency(correct, [[0, 1, 2], [0, 1, 2], [1, 0, 2]]) == pytest.approx(1 - 2 / 4)
    assert verifier_efficiency(correct, [[2, 1, 0], [0, 1, 2], [0, 2, 1]]) == pytest.approx(1 - 6 / 4)
    with pytest.raises(PosttrainError, match="no pool has a right completion"):
        verifier_efficiency([[False]], [[0]])


def test_a_pool_of_near_duplicates_shows_its_odd_one_early() -> None:
    policy = CausalPolicy(make_model(), make_tokenizer(), "tiny")
    pools = [scored([*["aaaa"] * 6, "zqzq", "aaaa"], [0.0] * 8), scored(["b", "b"], [0.0, 0.0])]
    first, second = exploration_orders(policy, pools)
    assert sorted(first) == list(range(8))
    assert first[0] == 6  # farthest from the pool's mean
    assert second == [0, 1]
