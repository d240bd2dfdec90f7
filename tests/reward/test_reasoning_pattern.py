from __future__ import annotations

import pytest
import torch

from posttrain.reward.reasoning_pattern import MATHS, OPEN_ENDED, ReasoningPattern, repetition
from posttrain.reward.reward import reward_from
from posttrain.trajectory import PosttrainError, Prompt

PROMPT = Prompt(torch.tensor([1]), text="q")


def test_ten_phrases_are_a_half() -> None:
    text = "Wait, alternatively we need to try again. Thus, hence, therefore; for example, for instance: so that"
    assert ReasoningPattern().count(text.lower()) == 10
    assert ReasoningPattern().score(text) == 0.5


def test_a_phrase_counts_once_and_repetition_is_taken_off() -> None:
    text = " ".join(["wait"] * 50)
    assert repetition(text, 20) == pytest.approx(1 / 31)
    assert ReasoningPattern().score(text) == pytest.approx(1 / 20 - 1 / 31)
    assert ReasoningPattern().score(text) == pytest.approx(0.01774, abs=5e-6)


def test_it_is_at_most_one_and_at_least_nothing() -> None:
    assert ReasoningPattern().score(" ".join(MATHS)) == 1
    assert ReasoningPattern().score("user: wait") == 0
    assert ReasoningPattern("open-ended").score("user: wait") == 1 / 20


def test_the_lists() -> None:
    assert len(MATHS) == len(set(MATHS)) == 40
    assert len(OPEN_ENDED) == len(set(OPEN_ENDED)) == 53
    assert ReasoningPattern("open-ended").count("1. i will") == 2
    assert ReasoningPattern(phrases=("x",), most=1).score("axb") == 1


def test_substrings_count_unless_words_are_asked_for() -> None:
    assert ReasoningPattern("open-ended").count("await 31. 5") == 2  # "wait" and "1. "
    words = ReasoningPattern("open-ended", words=True)
    assert words.count("await 31. 5") == 0
    assert words.count("wait! 1. so") == 2


def test_no_answer_no_reward() -> None:
    pattern = ReasoningPattern()
    assert pattern("wait", PROMPT) == 0
    assert pattern("wait Answer: 4", PROMPT) == 1 / 20
    assert ReasoningPattern(answer="number")("wait 4", PROMPT) == 1 / 20
    assert ReasoningPattern(answer="number")("wait", PROMPT) == 0
    assert ReasoningPattern(answer="none")("wait", PROMPT) == 1 / 20


def test_repetition_of_a_short_text_is_none() -> None:
    assert repetition("a b a b", 5) == 0
    assert repetition("a b a b", 2) == pytest.approx(1 / 3)  # "a b" twice, of three places


def test_it_is_a_verifier_by_name() -> None:
    reward = reward_from({"reasoning_pattern": {"weight": 2.0, "answer": "none"}})
    assert reward.score(PROMPT, "wait, thus", tokens=3, finish="stop").total == pytest.approx(0.2)
    with pytest.raises(PosttrainError, match="expected maths or open-ended"):
        ReasoningPattern("chemistry")  # type: ignore[arg-type]
