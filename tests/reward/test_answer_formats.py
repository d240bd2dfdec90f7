"""Answers in three formats: what counts as right, with card 014's unit checks, and what cannot be gamed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from posttrain.reward.answer_formats import (
    BoxMatch,
    InFormat,
    LabelOverlap,
    OpenAnswer,
    OptionLetters,
    YesNo,
    judgement,
    letters,
    overlap,
)
from posttrain.reward.reward import reward_from
from posttrain.trajectory import PosttrainError, Prompt


def prompt(answer: Any = None, **meta: Any) -> Prompt:
    return Prompt(torch.zeros(0, dtype=torch.int64), text="question", answer=answer, meta=meta)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("yes", True), ("That is True.", True), ("correct", True), ("No", False), ("false!", False),
        ("incorrect", False), ("maybe", None), ("yes and no", None), ("yesterday", None), ("know", None), ("", None),
    ],
)  # fmt: skip
def test_judgements(text: str, found: bool | None) -> None:
    assert judgement(text) is found


def test_letters_stand_alone_in_their_order() -> None:
    assert letters("A, C and A") == ("A", "C")
    assert letters("C, A") == ("C", "A")
    assert letters("Apple, BAD, F, b") == ()


@pytest.mark.parametrize(
    ("verifier", "completion", "answer", "value"),
    [
        (YesNo(), "<think>no?</think><answer>Yes</answer>", "yes", 1.0),
        (YesNo(), "no", "yes", 0.0),
        (YesNo(), "incorrect", False, 1.0),
        (YesNo(), "who knows", "no", 0.0),
        (YesNo(), "yes no", "yes", 0.0),
        (OptionLetters(), "<answer>A, C</answer>", "A,C", 1.0),
        (OptionLetters(), "<answer>C, A</answer>", "A,C", 0.0),  # as the released code: in order
        (OptionLetters(), "A", "A,C", 0.0),
        (OptionLetters(), "<answer></answer>", "B", 0.0),
        (LabelOverlap(), "a, b", "b c", 1 / 3),
        (LabelOverlap(), "B,a a", "a, b", 1.0),
        (LabelOverlap(), "", "a", 0.0),
        (BoxMatch(), "[0,0,10,10]", "[0, 0, 10, 10]", 1.0),
        (BoxMatch(), "[20,20,30,30]", "[0,0,10,10]", 0.0),
        (BoxMatch(), "[0,0,10,5]", "[0,0,10,10]", 0.0),  # exactly one half is not above it
        (BoxMatch(soft=True), "[0,0,10,5]", "[0,0,10,10]", 0.5),
        (BoxMatch(formed=True), "<answer>[0,0,10,10]</answer>", "[0,0,10,10]", 0.0),
        (BoxMatch(formed=True), '<answer>{"box": [0,0,10,10]}</answer>', "[0,0,10,10]", 1.0),
        (BoxMatch(), "a box", "[0,0,10,10]", 0.0),
        (OpenAnswer(), "<answer>3</answer>", "3", 1.0),
        (OpenAnswer(), "It is 3 apples.", "3", 1.0),
        (OpenAnswer(), "12", "1", 0.0),  # the released rule takes any substring
        (OpenAnswer(), "2 or 3", "3", 0.0),
        (OpenAnswer(), "3 3", "3", 0.0),
        (OpenAnswer(), "Paris it is", "paris", 1.0),
        (OpenAnswer(), "<answer>\\frac{1}{2}</answer>", "0.5", 1.0),
        (OpenAnswer(), "", "3", 0.0),
    ],
)
def test_verifiers(verifier: Any, completion: str, answer: Any, value: float) -> None:
    assert verifier(completion, prompt(answer)) == pytest.approx(value)


def test_overlap_is_symmetric_and_clean() -> None:
    first, second = (0.0, 0.0, 10.0, 10.0), (5.0, 5.0, 15.0, 15.0)
    assert overlap(first, first) == 1.0  # the released code's goes above 1
    assert overlap(first, second) == overlap(second, first) == 25 / 175
    assert overlap(first, (10.0, 0.0, 20.0, 10.0)) == 0
    assert overlap((1.0, 1.0, 1.0, 1.0), (1.0, 1.0, 1.0, 1.0)) == 0


def test_each_format_has_its_own_rule() -> None:
    scored = InFormat()
    assert scored("yes", prompt("yes", format="judge")) == 1
    assert scored("yes", prompt("A", format="choice")) == 0
    assert scored("A", prompt("A", format="choice")) == 1
    assert scored("7", prompt("7", format="open")) == scored("7", prompt("7")) == 1
    assert InFormat(open=LabelOverlap())("a", prompt("a b", format="open")) == 0.5
    with pytest.raises(PosttrainError, match="'verdict'; expected one of judge, choice, open"):
        scored("yes", prompt("yes", format="verdict"))


def test_a_reference_of_another_format_is_an_error_not_a_zero() -> None:
    for verifier, expected in ((YesNo(), "yes or no"), (OptionLetters(), "letters"), (BoxMatch(), "a box")):
        with pytest.raises(PosttrainError, match=expected):
            verifier("yes", prompt("17"))


def test_known_by_name() -> None:
    reward = reward_from({"in_format": 1.0, "format": 1.0})
    found = reward.score(prompt("no", format="judge"), "<think>.</think><answer>no</answer>", tokens=1, finish="stop")
    assert found.total == 2
    trailing = reward.score(
        prompt("no", format="judge"), "<think>.</think><answer>no</answer> so", tokens=1, finish="stop"
    )
    assert trailing.parts == {"in_format": 1, "format": 0}
