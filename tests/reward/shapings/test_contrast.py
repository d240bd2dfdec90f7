from __future__ import annotations

import re

import pytest

from posttrain.reward.shapings.contrast import RESPONSE_MODES, ContrastBonus, SignedOutcome
from posttrain.trajectory import Group, PosttrainError
from scored_groups import context, rewards_of, scored

FORMED, MALFORMED = "<answer>a</answer>", "a"


def judged(texts: list[str], right: list[float], twin: float | None = None) -> Group:
    group = scored(texts, right)
    for trajectory, each in zip(group.trajectories, right, strict=True):
        trajectory.facts["right"] = each
        if twin is not None:
            trajectory.facts["twin_accuracy"] = twin
    return group


def test_rewards_by_hand() -> None:
    group = judged([FORMED, FORMED, MALFORMED, MALFORMED], [1.0, 0.0, 0.0, 1.0], twin=0.5)
    SignedOutcome()([group], step := context())
    ContrastBonus()([group], step)
    assert rewards_of(group) == pytest.approx([3.4, -0.5, -2.5, 1.4])
    assert step.metrics == {"well_formed": 0.5, "contrast": 1.0}
    plain = judged([FORMED], [1.0])
    SignedOutcome()([plain], context())
    assert rewards_of(plain) == [3.0]


@pytest.mark.parametrize(
    ("right", "twin", "ratio", "bonus"),
    [
        ([1.0, 0.0], 0.5, 0.9, 0.4),
        ([1.0, 0.0], 0.6, 0.9, 0.0),  # 0.5 is not more than 0.54
        ([1.0, 0.0], 0.5, 1.0, 0.0),  # strictly more
        ([0.0, 0.0], 0.0, 0.9, 0.0),  # not even where both are 0
        ([1.0, 0.0], 1.0, 0.0, 0.4),  # a ratio of 0: whenever anything is right
        ([1.0, 1.0], 1.0, 0.9, 0.4),
    ],
)
def test_when_the_bonus_is_earned(right: list[float], twin: float, ratio: float, bonus: float) -> None:
    group = judged([FORMED] * 2, right, twin)
    ContrastBonus(ratio=ratio)([group], step := context())
    assert rewards_of(group) == pytest.approx([r + bonus * r for r in right])  # never for wrong completions
    assert step.metrics["contrast"] == float(bonus > 0)


def test_a_group_without_a_twin_gets_no_bonus() -> None:
    group = judged([FORMED] * 2, [1.0, 0.0])
    ContrastBonus()([group], step := context())
    assert rewards_of(group) == [1.0, 0.0]
    assert "contrast" not in step.metrics


@pytest.mark.parametrize(
    ("text", "well"),
    [
        ("<answer>b</answer>", True),
        ("<think>a\nb</think>\n<answer>b</answer>", True),
        ("<social context understanding>x</social context understanding><answer>b</answer>", True),
        ("<think>a</think>", False),
        ("<think>a</social context understanding><answer>b</answer>", False),
        ("<answer>a</answer><answer>b</answer>", False),
        ("<think>a</think><think>a</think><answer>b</answer>", False),
        ("so: <answer>b</answer>", False),
    ],
)
def test_three_modes_of_response(text: str, well: bool) -> None:
    assert (re.fullmatch(RESPONSE_MODES, text, re.DOTALL) is not None) == well


def test_a_broken_pattern_is_refused() -> None:
    with pytest.raises(PosttrainError, match="not a regular expression"):
        SignedOutcome(format="(")
