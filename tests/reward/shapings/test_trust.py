from __future__ import annotations

import math

import pytest

from posttrain.objective.schedule import Exponential
from posttrain.reward.shapings.trust import TrustedReward, trust_of
from posttrain.trajectory import PosttrainError, Prompt
from scored_groups import context, facts_of, rewards_of, scored


def test_trust_by_hand() -> None:
    assert trust_of(0.4 - 0.6) == pytest.approx(0.81873, abs=5e-6)
    assert trust_of(0.0) == trust_of(0.3) == trust_of(None) == 1.0


def test_wrong_completions_that_score_higher_lower_the_trust_of_their_group() -> None:
    doubted = scored(["a", "b", "c"], [1.0, 0.0, 0.0], process=[0.4, 0.5, 0.7])
    believed = scored(["a", "b"], [1.0, 0.0], process=[0.9, 0.2])
    TrustedReward()([doubted, believed], step := context())
    gamma = math.exp(-0.2)
    assert rewards_of(doubted) == pytest.approx([1 + gamma * 0.3 * 0.4, gamma * 0.3 * 0.5, gamma * 0.3 * 0.7])
    assert rewards_of(doubted)[0] == pytest.approx(1.09825, abs=5e-6)
    assert rewards_of(believed) == pytest.approx([1.27, 0.06])
    assert facts_of(doubted, "trust") == pytest.approx([gamma] * 3)
    assert facts_of(doubted, "thinking") == [0.4, 0.5, 0.7]
    assert step.metrics["trust"] == pytest.approx((gamma + 1) / 2)
    assert step.metrics["thinking_margin"] == pytest.approx((-0.2 + 0.7) / 2)
    assert step.metrics["thinking"] == pytest.approx(2.7 / 5)


def test_the_weight_decays_by_optimizer_steps() -> None:
    def earned(shaping: TrustedReward, step: int) -> float:
        group = scored(["a", "b"], [1.0, 0.0], process=[1.0, 0.0])
        shaping([group], context(step=step, total=200))
        return rewards_of(group)[0] - 1

    assert earned(TrustedReward(weight=Exponential(0.3, 50)), 50) == pytest.approx(0.3 / math.e)
    assert earned(TrustedReward(), 200) == pytest.approx(0.3 / math.e)  # T is the stage's steps
    assert earned(TrustedReward(weight=0.3), 150) == pytest.approx(0.3)


def test_decided_groups_get_no_thinking_reward_unless_asked() -> None:
    for outcomes in ([1.0, 0.9], [0.0, 0.1]):
        group = scored(["a", "b"], outcomes, process=[0.9, 0.1])
        TrustedReward()([group], step := context())
        assert rewards_of(group) == outcomes
        assert "trust" not in step.metrics
        kept = scored(["a", "b"], outcomes, process=[0.9, 0.1])
        TrustedReward(drop=False, weight=0.5)([kept], context())
        assert rewards_of(kept) == pytest.approx([outcomes[0] + 0.45, outcomes[1] + 0.05])  # an empty side: trust 1


def test_without_trust_the_margin_changes_nothing() -> None:
    group = scored(["a", "b"], [1.0, 0.0], process=[0.0, 1.0])
    TrustedReward(weight=0.3, trust=False)([group], context())
    assert rewards_of(group) == pytest.approx([1.0, 0.3])


def test_a_callable_judges_every_completion_and_a_failure_is_nothing() -> None:
    asked: list[str] = []

    def model(completion: str, prompt: Prompt, *, tokens: int) -> float:
        asked.append(completion)
        if completion == "broken":
            raise ValueError("no number")
        return float(tokens)  # beyond 1: cut

    group = scored(["good", "broken"], [1.0, 0.0])
    TrustedReward(model, weight=0.3)([group], context())
    assert asked == ["good", "broken"]
    assert rewards_of(group) == pytest.approx([1.3, 0.0])


def test_an_unknown_component_is_named() -> None:
    with pytest.raises(PosttrainError, match="no component 'process' for the thinking; it has answer"):
        TrustedReward()([scored(["a"], [1.0], answer=[1.0])], context())
