from __future__ import annotations

import pytest

from posttrain.reward.shapings.noise import NoisyReward
from posttrain.trajectory import Group, PosttrainError
from scored_groups import context, facts_of, rewards_of, scored


def groups(count: int) -> list[Group]:
    return [scored(["a", "b", "c", "d"], [1.0, 0.0, 0.0, 0.25]) for _ in range(count)]


def test_never_and_always() -> None:
    (group,) = groups(1)
    NoisyReward(0.0)([group], context())
    assert rewards_of(group) == [1.0, 0.0, 0.0, 0.25]
    NoisyReward(1.0)([group], step := context())
    assert rewards_of(group) == [0.0, 1.0, 1.0, 0.75]
    assert facts_of(group, "clean_reward") == [1.0, 0.0, 0.0, 0.25]
    assert step.metrics == {"clean_reward": 0.3125, "flipped": 1.0}


def test_a_prompt_is_flipped_as_a_whole() -> None:
    many = groups(400)
    NoisyReward(0.3)(many, context())
    kinds = {tuple(rewards_of(g)) for g in many}
    assert kinds == {(1.0, 0.0, 0.0, 0.25), (0.0, 1.0, 1.0, 0.75)}
    flipped = sum(rewards_of(g)[0] == 0 for g in many) / len(many)
    assert flipped == pytest.approx(0.3, abs=0.07)


def test_a_rollout_is_flipped_alone() -> None:
    many = groups(400)
    NoisyReward(0.3, "rollout")(many, context())
    assert len({tuple(rewards_of(g)) for g in many}) > 8
    for place, reward in enumerate((1.0, 0.0, 0.0, 0.25)):
        mean = sum(rewards_of(g)[place] for g in many) / len(many)
        assert mean == pytest.approx(0.3 + (1 - 2 * 0.3) * reward, abs=0.07)


def test_the_average_over_flips() -> None:
    many = groups(2000)
    NoisyReward(0.4)(many, context(seed=5))
    for place, reward in enumerate((1.0, 0.0, 0.0, 0.25)):
        mean = sum(rewards_of(g)[place] for g in many) / len(many)
        assert mean == pytest.approx(0.4 + (1 - 2 * 0.4) * reward, abs=0.03)


def test_coins_follow_from_the_step() -> None:
    def noisy(seed: int) -> list[list[float]]:
        many = groups(20)
        NoisyReward(0.5)(many, context(seed=seed))
        return [rewards_of(g) for g in many]

    assert noisy(1) == noisy(1)
    assert noisy(1) != noisy(2)  # the same prompt may be flipped in one epoch and not in the next


def test_what_cannot_be_flipped_is_refused() -> None:
    with pytest.raises(PosttrainError, match="rewards between 0 and 1; a completion has 2"):
        NoisyReward()([scored(["a"], [2.0])], context())
    with pytest.raises(PosttrainError, match="expected a probability"):
        NoisyReward(1.5)
    with pytest.raises(PosttrainError, match="prompt or rollout"):
        NoisyReward(0.5, "batch")  # type: ignore[arg-type]
