"""Lengths, behaviours and alarms by hand, and a log in which the response limit is cut in half."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from posttrain.evaluation.behaviour import Diagnosis, Lengths, PhraseJudge, alarms, diagnose, lengths
from posttrain.evaluation.evaluation import Evaluation
from posttrain.trajectory import PosttrainError


def test_lengths_of_what_stopped_and_of_all() -> None:
    found = lengths([100, 40, 60], [False, True, True])
    assert found.mean == pytest.approx(66.7, abs=0.05)
    assert found.stopped == 50
    assert found.truncated == pytest.approx(1 / 3)
    assert math.isnan(lengths([5], [False]).stopped)
    with pytest.raises(PosttrainError, match="2 lengths and 1 ends"):
        lengths([1, 2], [True])


def test_half_the_limit_cuts_more_off_and_what_stops_is_shorter() -> None:
    natural = np.random.default_rng(0).integers(1, 200, size=1000)

    def under(limit: int) -> Lengths:
        return lengths(np.minimum(natural, limit).tolist(), (natural < limit).tolist())

    whole, half = under(160), under(80)
    assert half.truncated > whole.truncated + 0.3
    assert half.stopped < 0.6 * whole.stopped


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("Wait, that is wrong.", {"backtracking"}),
        ("I await your answer.", set()),
        ("Let me check: 3 * 4 = 12.", {"verification"}),
        ("First, we add. Step 2: divide.", {"subgoals"}),
        ("Case 1: x > 0. Case 2: x < 0.", {"enumeration"}),
        ("We try each of them, then verify.", {"enumeration", "verification"}),
        ("The answer is 4.", set()),
    ],
)
def test_phrases_that_give_behaviours_away(response: str, expected: set[str]) -> None:
    assert set(PhraseJudge()("question", response)) == expected


def evaluation(correct: list[list[bool]], texts: list[list[str]]) -> Evaluation:
    right = np.array(correct)
    return Evaluation(
        "t", ["q1", "q2"], [1, 2], [1, 2], texts, right.astype(float), right, {},
        np.array([[10, 20, 30, 40]] * 2), np.array([[True, True, True, False]] * 2), None,
    )  # fmt: skip


def test_a_checkpoint() -> None:
    texts = [["wait", "no", "no", "no"], ["wait; let me check", "no", "no", "no"]]
    found = diagnose(evaluation([[True, False, False, False], [False] * 4], texts))
    assert found.accuracy == 0.125
    assert found.pass_at == {1: 0.125, 2: 0.25, 4: 0.5}  # of four samples with one right, pass@2 is 0.5
    assert found.lengths == Lengths(25.0, 20.0, 0.25)
    assert found.behaviours == {"backtracking": 0.25, "verification": 0.125, "subgoals": 0.0, "enumeration": 0.0}
    assert found.metrics()["behaviour/backtracking"] == 0.25
    assert found.metrics()["stopped_length"] == 20.0
    asked = diagnose(evaluation([[False] * 4] * 2, texts), [3], lambda question, response: [question, question])
    assert asked.behaviours == {"q1": 0.5, "q2": 0.5}
    assert asked.pass_at == {3: 0.0}


def test_alarms_of_degenerate_growth_and_collapse() -> None:
    first = Diagnosis(0.4, Lengths(100, 90, 0.05), {}, {})
    running_on = replace(first, lengths=Lengths(150, 92, 0.3))
    reasoning = replace(first, lengths=Lengths(150, 120, 0.3))
    fallen = replace(first, accuracy=0.2)
    assert alarms([]) == alarms([first]) == alarms([first, reasoning]) == []
    assert alarms([first, running_on]) == ["degenerate growth"]
    assert alarms([first, replace(running_on, lengths=Lengths(200, math.nan, 1.0))]) == ["degenerate growth"]
    assert alarms([first, fallen]) == ["collapse"]
    assert alarms([fallen, first]) == []
