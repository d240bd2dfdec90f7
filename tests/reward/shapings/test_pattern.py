from __future__ import annotations

from typing import Any

import pytest

from posttrain.reward.shapings.pattern import Calibrated, PatternOnly
from posttrain.trajectory import PosttrainError, Prompt
from scored_groups import context, facts_of, rewards_of, scored


def tenths(completion: str, prompt: Prompt, **rest: Any) -> float:
    return int(completion) / 10


def test_low_scores_are_lifted_and_high_ones_stay() -> None:
    group = scored(["8", "8", "0", "10"], [0.45, 0.55, 0.2, 0.5])
    Calibrated(tenths)([group], step := context())
    assert rewards_of(group) == pytest.approx([0.53, 0.55, 0.2, 0.5])
    assert facts_of(group, "pattern") == [0.8, 0.8, 0.0, 1.0]
    assert step.metrics == pytest.approx({"pattern": 2.6 / 4, "lifted": 0.5})


def test_a_lifted_score_is_at_most_one_and_all_may_be_lifted() -> None:
    group = scored(["10", "10"], [0.3, 0.95])
    Calibrated(tenths, weight=0.9, below=2.0)([group], context())
    assert rewards_of(group) == pytest.approx([1.0, 1.0])


def test_a_malformed_completion_is_lifted_from_nothing() -> None:
    group = scored(["8", "8"], [0.9, 0.9], form=[0.0, 1.0])
    Calibrated(tenths, form="form")([group], context())
    assert rewards_of(group) == pytest.approx([0.08, 0.9])
    with pytest.raises(PosttrainError, match="no component 'shape'; it has form"):
        Calibrated(tenths, form="shape")([group], context())


def test_the_pattern_alone_and_the_switch() -> None:
    def reward(shaping: PatternOnly, step: int) -> list[float]:
        group = scored(["8", "2"], [0.0, 1.0])
        shaping([group], context(step=step, total=10))
        assert facts_of(group, "pattern") == [0.8, 0.2]
        return rewards_of(group)

    assert reward(PatternOnly(tenths), 9) == [0.8, 0.2]
    assert reward(PatternOnly(tenths, share=0.5), 4) == [0.8, 0.2]
    assert reward(PatternOnly(tenths, share=0.5), 5) == [0.0, 1.0]


def test_defaults_are_the_papers() -> None:
    group = scored(["i will wait", "user: Answer: 3 wait"], [0.1, 0.0])
    Calibrated()([group], context())
    assert rewards_of(group) == pytest.approx([0.1 + 0.1 * 2 / 20, 0.1 * 1 / 20])
    maths = scored(["i will wait. Answer: 3", "wait"], [0.1, 0.0])
    PatternOnly()([maths], context())
    assert rewards_of(maths) == pytest.approx([1 / 20, 0.0])  # no answer, no reward
