"""Formats of completions: the paper's classes on hand-written texts, shares, entropy and majorities by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from posttrain.evaluation.evaluation import Evaluation
from posttrain.evaluation.formats import MATHS, format_metrics, format_shares, majority_at_k
from posttrain.evaluation.statistics import pass_at_k
from posttrain.trajectory import PosttrainError

CODE = "def simple_math_problem() -> int:\n    x = 3\n    return x"
BLOCK = "Let's use Python.\n<llm-code>\nprint(3)\n</llm-code>\nSo the answer is \\boxed{3}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (CODE, "tinygsm"),
        (CODE.replace("x = 3", "x = 4"), "tinygsm"),  # right or wrong makes no difference
        (BLOCK, "openmathinstruct1"),
        ("Three and one, so \\boxed{4}.", "natural language"),
        ("The answer is 4", "natural language"),
        ("#### 4", "natural language"),
        ("4", "other"),
        ("def other():\n    return 4", "other"),
    ],
)
def test_the_paper_s_formats(text: str, expected: str) -> None:
    assert MATHS(text) == expected


def test_shares_accuracy_and_entropy() -> None:
    found = format_shares(["aa", "a", "b", "b"], [True, False, True, True], lambda text: text[0])
    assert found.shares == {"a": 0.5, "b": 0.5}
    assert found.accuracy == {"a": 0.5, "b": 1.0}
    assert found.entropy == pytest.approx(math.log(2))
    assert found.winner == "a"
    assert format_shares(["a"] * 3, [True] * 3, lambda text: text).entropy == 0
    three = format_shares(["a"] * 5 + ["b"] * 3 + ["c"] * 2, [True] * 10, lambda text: text)
    assert three.entropy == pytest.approx(1.02965, abs=5e-6)  # the card's mixture: about 1.0 nats
    with pytest.raises(PosttrainError, match="0 texts"):
        format_shares([], [], str)


def test_majorities_of_blocks() -> None:
    answers = [["1", "2", "2", "1", "1", None]]
    correct = [[True, False, False, True, True, False]]
    assert majority_at_k(answers, correct, 6) == 1.0
    assert majority_at_k(answers, correct, 3) == 0.5  # 1 2 2 is wrong, 1 1 None right
    assert majority_at_k(answers, correct, 1) == 0.5
    assert majority_at_k([[None, None]], [[False, False]], 2) == 0.0
    with pytest.raises(PosttrainError, match="k=7 of 6 samples"):
        majority_at_k(answers, correct, 7)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_that_over_all_subsets(k: int) -> None:
    outcomes = [True, False, False, True, False]
    every = list(itertools.combinations(outcomes, k))
    assert pass_at_k(5, 2, k) == pytest.approx(sum(map(any, every)) / len(every))


def test_a_checkpoint_s_row() -> None:
    right = np.array([[True, False, True, False]])
    found = Evaluation(
        "t", ["q"], [1], [1], [["a1", "a2", "b1", "b2"]], right.astype(float), right, {}, np.ones((1, 4), dtype=int),
        right, None,
    )  # fmt: skip
    row = format_metrics(found, lambda text: text[0], ks=(1, 2), answer=lambda text: text[1])
    assert row == pytest.approx(
        {
            "format/a": 0.5, "format/b": 0.5, "format_accuracy/a": 0.5, "format_accuracy/b": 0.5,
            "format_entropy": math.log(2), "pass@1": 0.5, "pass@2": 5 / 6, "majority@4": 1.0,
        }
    )  # fmt: skip
    assert "majority@4" not in format_metrics(found, str)
