from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.reward.catalogue import VERIFIERS
from posttrain.reward.verifiers import (
    Contains,
    ExactMatch,
    Format,
    LastNumber,
    Length,
    MathVerify,
    OverlongPenalty,
    ReasoningGym,
    Regex,
)
from posttrain.trajectory import PosttrainError, Prompt


def prompt(answer: Any = None, **meta: Any) -> Prompt:
    return Prompt(torch.zeros(0, dtype=torch.int64), text="question", answer=answer, meta=meta)


@pytest.mark.parametrize(
    ("verifier", "completion", "answer", "value"),
    [
        (ExactMatch(), "so Answer: Paris.", "Paris", 1),
        (ExactMatch(), "paris", "Paris", 0),
        (ExactMatch(ignore_case=True), "paris", "Paris", 1),
        (ExactMatch(), "1,000.0", 1000, 1),
        (ExactMatch(normalise_numbers=False), "1,000.0", 1000, 0),
        (ExactMatch(strip=False), " Paris ", "Paris", 0),
        (ExactMatch(), " Paris ", "Paris", 1),
        (ExactMatch(), "two", ["2", "two"], 1),
        (LastNumber(), "3 and then $1,250", "1250", 1),
        (LastNumber(), "#### 5 (out of 9)", "9", 1),
        (LastNumber(), "no number", "9", 0),
        (LastNumber(), "Answer: 8\nIn 1969 that was rare.", "8", 1),
        (Contains(), "we see that Paris is", "Paris", 1),
        (Contains("please"), "Please do", None, 0),
        (Contains("please", ignore_case=True), "Please do", None, 1),
        (Regex(r"\d+"), "room 12", None, 1),
        (Regex(r"\d+"), "room", None, 0),
        (Regex(r"is (\d+)", group=1), "it is 3, no, it is 4.0", "4", 1),
        (Regex(r"is (?P<n>\d+)", group="n"), "it is 3, no, it is 4", "3", 0),
        (Regex(r"is (\d+)", group=1), "nothing", "4", 0),
        (Format(), "<think>a\nb</think>\n<answer>1</answer>\n", None, 1),
        (Format(), "well <think>a</think><answer>1</answer>", None, 0),
        (Format(r"\d+"), "12 ", None, 1),
        (Format(r"\d+"), "12 apples", None, 0),
    ],
)
def test_rule(verifier: Any, completion: str, answer: Any, value: float) -> None:
    assert verifier(completion, prompt(answer), tokens=3, finish="stop") == value


@pytest.mark.parametrize(
    ("completion", "answer", "value"),
    [
        ("12 + 7 = 19\n19 - 5 = 14\nAnswer: 14", "14", 1),
        ("12 + 7 = 19\n19 - 5 = 14", "14", 1),
        ("Answer: The total is 14 apples.", 14, 1),
        (r"\boxed{0.5}", "1/2", 1),
        (r"<answer>$\frac12$</answer>", r"\frac{1}{2}", 1),
        ("Answer: 1+x^2", "x^2 + 1", 1),
        ("Answer: 2*x+1", "2", 0),
        ("1,000", "1000", 1),
        ("<answer>51</answer> though 50 was close", "50", 0),
        ("no idea", "50", 0),
        ("", "50", 0),
    ],
)
def test_math_verify(completion: str, answer: Any, value: float) -> None:
    assert MathVerify()(completion, prompt(answer)) == value


def test_math_verify_works_outside_the_main_thread() -> None:
    values: list[float] = []

    def work() -> None:
        values.extend(MathVerify()(text, prompt("14")) for text in ("Answer: 14", "Answer: 15"))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert values == [1.0, 0.0]


def test_a_reference_no_verifier_can_read_is_an_error_not_a_zero() -> None:
    with pytest.raises(PosttrainError, match="cannot read the reference answer 'Paris'; try exact_match"):
        MathVerify()("Paris", prompt("Paris"))
    with pytest.raises(PosttrainError, match="is no number"):
        LastNumber()("3", prompt("three"))
    for verifier in (ExactMatch(), LastNumber(), MathVerify(), Contains(), Regex("(a)", group=1)):
        with pytest.raises(PosttrainError, match="has no reference answer"):
            verifier("a", prompt(None), tokens=1, finish="stop")


def test_length_counts_the_declared_unit() -> None:
    assert Length(5)("abcdefgh", prompt(), tokens=5) == 1
    assert Length(5)("abc", prompt(), tokens=6) == 0
    assert Length(5, unit="characters")("abcdefgh", prompt(), tokens=1) == 0


def test_overlong_penalty_by_hand() -> None:
    penalty = OverlongPenalty(max_tokens=100, buffer=20)
    values = [penalty("", prompt(), tokens=n) for n in (1, 80, 85, 90, 100, 140)]
    assert values == pytest.approx([0, 0, -0.25, -0.5, -1, -1])


@given(st.integers(1, 500), st.integers(0, 499), st.integers(0, 1000))
@settings(deadline=None)
def test_overlong_penalty_falls_monotonically_within_minus_one_and_zero(maximum: int, slack: int, tokens: int) -> None:
    penalty = OverlongPenalty(maximum, buffer=max(1, maximum - slack))
    now, later = (penalty("", prompt(), tokens=n) for n in (tokens, tokens + 1))
    assert -1 <= later <= now <= 0


def test_reasoning_gym_scores_by_the_task_itself() -> None:
    import reasoning_gym

    data = reasoning_gym.create_dataset("chain_sum", seed=3, size=5)
    for entry in data:
        right, wrong = entry["answer"], str(int(entry["answer"]) + 1)
        assert ReasoningGym()(f"thinking\nAnswer: {right}", prompt(entry=entry)) == 1
        assert ReasoningGym("chain_sum")(f"<answer>{right}</answer>", prompt(entry=entry)) == 1
        assert ReasoningGym()(f"The answer is {right}.", prompt(entry=entry)) == 1
        assert ReasoningGym()(f"3 apples, so it is {right}", prompt(entry=entry)) == 1
        assert ReasoningGym()(f"not {right} but {wrong}", prompt(entry=entry)) < 1
        assert ReasoningGym()(f"Answer: {wrong}", prompt(entry=entry)) == data.score_answer(wrong, entry) < 1


def test_reasoning_gym_accepts_any_right_answer_not_only_the_stored_one() -> None:
    import reasoning_gym

    (entry,) = reasoning_gym.create_dataset("countdown", seed=1, size=1)
    numbers = entry["metadata"]["expression"]
    assert ReasoningGym()(f"Answer: 0 + {numbers}", prompt(entry=entry)) < 1  # 0 is not among the numbers
    assert ReasoningGym()(f"Answer: ({numbers})", prompt(entry=entry)) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Regex("("), "not a regular expression"),
        (lambda: Format("["), "not a regular expression"),
        (lambda: Regex("a", group=1), "has no group 1"),
        (lambda: Regex("(?P<n>a)", group="m"), "has no group 'm'"),
        (lambda: Length(0), "at least 1"),
        (lambda: OverlongPenalty(10, 11), "0 < buffer <= max_tokens"),
        (lambda: ReasoningGym("chain_sun"), "did you mean chain_sum"),
        (lambda: ReasoningGym()("1", prompt()), "entry"),
    ],
)
def test_bad_arguments_say_what_was_expected(make: Any, message: str) -> None:
    with pytest.raises(PosttrainError, match=message):
        make()


def test_every_registered_verifier_is_documented() -> None:
    assert list(VERIFIERS) == sorted(VERIFIERS)
    for verifier in VERIFIERS.values():
        assert verifier.__doc__
        assert not verifier.__doc__.startswith(verifier.__name__)  # that is what dataclass writes where there is none
