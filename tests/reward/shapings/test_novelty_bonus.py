from __future__ import annotations

import pytest
import torch

from conftest import make_model, make_tokenizer
from posttrain.models.causal import CausalPolicy
from posttrain.models.representation import mean_hidden
from posttrain.reward.shapings.novelty import Novelty
from posttrain.rollout.novelty import elliptical_bonus
from posttrain.trajectory import PosttrainError
from scored_groups import context, facts_of, rewards_of, scored


@pytest.fixture(scope="module")
def policy() -> CausalPolicy:
    return CausalPolicy(make_model(), make_tokenizer(), "tiny")


def test_the_bonus_of_each_group_is_added(policy: CausalPolicy) -> None:
    groups = [scored(["ab", "ab", "xyz"], [1.0, 0.0, 0.0]), scored(["p", "qq"], [1.0, 1.0])]
    states = mean_hidden(policy, groups)
    first, second = elliptical_bonus(states[:3], 0.5), elliptical_bonus(states[3:], 0.5)
    Novelty(weight=0.2, reward=2.0, ridge=0.5, dimensions=None)(groups, step := context(policy))
    assert facts_of(groups[0], "novelty") == pytest.approx(first.tolist())
    assert first[2] > 2 * first[0]
    assert rewards_of(groups[0]) == pytest.approx((torch.tensor([2.0, 0, 0]) + 0.2 * first).tolist())
    assert rewards_of(groups[1]) == pytest.approx((2 + 0.2 * second).tolist())
    assert step.metrics["novelty"] == pytest.approx(float((first.sum() + second.sum()) / 5))
    spread = (float(first.std(unbiased=False)) + float(second.std(unbiased=False))) / 2
    assert step.metrics["novelty_spread"] == pytest.approx(spread)


def test_a_group_without_a_right_completion_gets_none(policy: CausalPolicy) -> None:
    group = scored(["ab", "cd", "xyz"], [0.0, 0.0, 0.4])
    Novelty(weight=1.0)([group], context(policy))
    assert rewards_of(group) == [0.0, 0.0, 0.4]
    Novelty(weight=1.0, correct=0.4)([group], context(policy))
    assert rewards_of(group)[0] > 0.1


def test_identical_completions_get_none(policy: CausalPolicy) -> None:
    group = scored(["ab"] * 3, [1.0, 1.0, 1.0])
    Novelty(weight=1.0)([group], context(policy))
    assert rewards_of(group) == pytest.approx([1.0] * 3, abs=1e-6)


def test_the_projection_is_drawn_anew_each_step_and_repeats_with_its_seed(policy: CausalPolicy) -> None:
    def bonus(seed: int) -> list[float]:
        group = scored(["ab", "cd", "xyz"], [1.0, 0.0, 0.0])
        Novelty(dimensions=4)([group], context(policy, seed=seed))
        return facts_of(group, "novelty")

    assert bonus(1) == bonus(1)
    assert bonus(1) != pytest.approx(bonus(2))


def test_completions_that_say_the_same_are_not_novel_whatever_the_rounding() -> None:
    """A ridge relative to a spread of nothing but rounding would make noise of it, or divide by 0."""
    one = torch.randn(1, 16, generator=torch.Generator().manual_seed(0))
    noise = 1e-6 * torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
    relative = Novelty(ridge=0.5, relative=True, dimensions=None)
    for same in (one.repeat(8, 1), one * (1 + noise), torch.zeros(8, 16)):
        assert relative.bonus(same).tolist() == [0.0] * 8
    assert float(relative.bonus(one * (1 + 1e4 * noise)).min()) > 0


def test_a_small_ridge_discriminates_nothing_and_a_relative_one_does(policy: CausalPolicy) -> None:
    group = scored(["ab", "ab!", "xyz", "xy"], [1.0, 0.0, 0.0, 0.0])
    states = 100 * mean_hidden(policy, [group])
    flat = Novelty(ridge=1e-6, dimensions=None).bonus(states)
    assert flat.tolist() == pytest.approx([0.75] * 4, abs=1e-3)  # (n - 1)/n for every distinct one
    relative = Novelty(ridge=0.5, relative=True, dimensions=None)
    assert float(relative.bonus(states).std()) > 0.01
    torch.testing.assert_close(relative.bonus(states), relative.bonus(states / 100))
    centred = states.double() - states.double().mean(0)
    by_hand = elliptical_bonus(states, 0.5 * float((centred**2).sum()) / 4)
    torch.testing.assert_close(relative.bonus(states), by_hand)


def test_against_the_others_alone(policy: CausalPolicy) -> None:
    v = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    v = v - v.mean(0)
    found = Novelty(ridge=0.1, leave_one_out=True, dimensions=None).bonus(v)
    for i in range(4):
        others = torch.cat([v[:i], v[i + 1 :]])
        inverse = torch.linalg.inv(0.1 * torch.eye(3, dtype=torch.float64) + others.T @ others)
        assert float(found[i]) == pytest.approx(float(v[i] @ inverse @ v[i]))


def test_arguments_are_checked() -> None:
    with pytest.raises(PosttrainError, match="more than 0"):
        Novelty(ridge=0.0)
