"""DUMP's bandit: card 087's unit checks with their numbers, what it remembers, and that it survives a restart."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from posttrain.data.bandit import UpperConfidence, softmax, upper_confidence
from posttrain.objective.advantage import GroupNormalised
from posttrain.trajectory import Group, PosttrainError, Prompt, Source, Trajectory

DOMAINS = ("a", "b", "c")


def prompts(each: int = 8) -> list[Prompt]:
    return [Prompt(torch.tensor([1]), key=i, meta={"domain": DOMAINS[i % 3]}) for i in range(3 * each)]


def group(domain: str, *rewards: float, source: Source = "policy") -> Group:
    mask = torch.tensor([False, True])
    made = [Trajectory(torch.tensor([1, 2]), mask, reward=r, source=source) for r in rewards]
    return Group(made, Prompt(torch.tensor([1]), meta={"domain": domain}))


def test_alike_arms_are_drawn_alike() -> None:  # (a)
    shares = softmax(upper_confidence([0.3, 0.3, 0.3], [40, 40, 40]), 0.1)
    np.testing.assert_allclose(shares, 1 / 3, rtol=1e-12)


def test_shares_by_hand() -> None:  # (b)
    bonus = upper_confidence([0, 0], [1000, 1000])
    np.testing.assert_allclose(bonus, math.sqrt(2 * math.log(2001) / 1001), rtol=1e-12)
    np.testing.assert_allclose(bonus, 0.12324, atol=5e-6)
    shares = softmax(upper_confidence([0.5, 0.1], [1000, 1000]), 0.1)
    np.testing.assert_allclose(shares, [0.98201, 0.01799], atol=5e-6)


def test_an_arm_that_was_never_seen_comes_first() -> None:  # (c)
    bounds = upper_confidence([1.0, 0.9, 0.0], [5000, 5000, 0])
    assert bounds.argmax() == 2
    assert softmax(bounds, 0.1)[2] > 0.99


def test_the_mean_absolute_advantage_of_a_success_rate() -> None:  # (d)
    sampler = UpperConfidence(prompts())
    sampler.admit([group("a", 1, 0, 0, 0)])
    population = sum(sampler.recent["a"]) / 4 * math.sqrt(4 / 3)  # GRPO divides by the unbiased deviation
    assert population == pytest.approx(2 * math.sqrt(3 / 16), abs=2e-4)
    assert population == pytest.approx(0.8660, abs=2e-4)


def test_the_first_rows_come_from_all_alike() -> None:
    np.testing.assert_allclose(UpperConfidence(prompts()).probabilities(), 1 / 3)


def test_advantages_are_remembered_in_size_and_by_completion() -> None:
    sampler = UpperConfidence(prompts(), window=6)
    groups = [group("b", 1, 0, 0, 0), group("b", 0.5, 0.5), group("c", 1, 1)]
    assert sampler.admit(groups) == groups
    assert sampler.counts == {"a": 0, "b": 6, "c": 2}
    expected = GroupNormalised().normalise(torch.zeros(4, dtype=torch.int64), torch.tensor([1.0, 0, 0, 0])).abs()
    assert list(sampler.recent["b"]) == pytest.approx([*expected.tolist(), 0, 0])
    assert sum(sampler.recent["b"]) > 1, "signed advantages would add up to 0"
    sampler.admit([group("b", 1, 1, 1)])
    assert len(sampler.recent["b"]) == 6
    assert list(sampler.recent["b"])[-3:] == [0, 0, 0]
    assert sampler.counts["b"] == 9, "the count goes on where the window forgets"


def test_what_the_policy_did_not_write_is_not_counted() -> None:
    sampler = UpperConfidence(prompts())
    mixed = group("a", 1, 0)
    mixed.trajectories += group("a", 1, source="expert").trajectories
    sampler.admit([mixed, group("b", 1, source="expert")])
    assert sampler.counts == {"a": 2, "b": 0, "c": 0}


def test_where_the_advantages_are_large_the_rows_come_from() -> None:
    sampler = UpperConfidence(prompts())
    for _ in range(200):
        sampler.admit([group("a", 1, 1, 1, 1), group("b", 1, 0, 1, 0), group("c", 0, 0, 0, 0)])
    assert sampler.probabilities()[1] > 0.99
    assert all(i % 3 == 1 for i in sampler.take(50))
    assert sampler.metrics()["advantage/b"] == pytest.approx(math.sqrt(3 / 4), abs=1e-3)
    for _ in range(200):
        sampler.admit([group("b", 1, 1, 1, 1)])  # solved now: the window has forgotten what was
    assert sampler.probabilities()[1] < 0.4


def test_the_advantage_may_be_another() -> None:
    centred = UpperConfidence(prompts(), advantage=GroupNormalised("none"))
    centred.admit([group("a", 1, 0, 0, 0)])
    assert list(centred.recent["a"]) == [0.75, 0.25, 0.25, 0.25]


def test_a_restored_bandit_draws_the_same() -> None:
    whole, other = UpperConfidence(prompts(), 3, window=5), UpperConfidence(prompts(), 3, window=5)
    whole.take(5)
    whole.admit([group("a", 1, 0, 0), group("c", 0.3, 0.1, 0.2)])
    other.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert other.probabilities().tolist() == whole.probabilities().tolist()
    assert other.take(40) == whole.take(40)
    for sampler in (whole, other):
        sampler.admit([group("a", 1, 1, 0)])
    assert other.state_dict() == whole.state_dict()


def test_bad_arguments() -> None:
    with pytest.raises(PosttrainError, match="temperature=0"):
        UpperConfidence(prompts(), temperature=0)
