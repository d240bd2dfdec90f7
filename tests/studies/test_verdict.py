"""The rule, by numbers worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest

from posttrain.studies.study import Arm, Measured, Study
from posttrain.studies.verdict import (
    AtLeast,
    AtMost,
    Better,
    Expectation,
    Finding,
    Less,
    Lower,
    Within,
    overall,
    student,
)
from posttrain.trajectory import PosttrainError

T2 = 4.302652729911275  # t(0.975) with two degrees of freedom, from tables
NAN = math.nan


def arms(**values: list[float]) -> dict[str, list[dict[str, float]]]:
    return {name: [{"score": v} for v in column] for name, column in values.items()}


def test_mean_and_interval() -> None:
    mean, (low, high) = student([1.0, 2.0, 3.0])  # standard deviation 1, standard error 1/sqrt(3)
    assert mean == 2
    assert high - mean == pytest.approx(T2 / math.sqrt(3))
    assert mean - low == pytest.approx(T2 / math.sqrt(3))
    for values in ([1.0], [1.0, NAN, 2.0]):
        assert all(math.isnan(end) for end in student(values)[1])


def test_two_arms_are_paired_by_seed() -> None:
    """Differences 1, 2, 3: mean 2, interval 2 ± 4.303/√3 = [-0.48, 4.48], t = 2√3, p = 0.0742."""
    figures = arms(a=[11, 22, 33], b=[10, 20, 30])
    found = Better("a", "b", "score", why="because").judge(figures)
    assert (found.effect, found.why, found.metric) == (2, "because", "score")
    assert (found.low, found.high) == pytest.approx((2 - T2 / math.sqrt(3), 2 + T2 / math.sqrt(3)))
    t = 2 * math.sqrt(3)
    assert found.pvalue == pytest.approx(1 - t / math.sqrt(t * t + 2))  # of Student's t with two degrees of freedom
    assert found.verdict == "unclear"
    assert str(found.expectation) == "score: a higher than b"


@pytest.mark.parametrize(
    ("expectation", "a", "verdict"),
    [  # b is 0; a is around a mean m with differences -0.1, 0, 0.1 of it: the interval is m ± 0.248
        (Better("a", "b", "score"), 0.25, "holds"),
        (Better("a", "b", "score"), 0.24, "unclear"),
        (Better("a", "b", "score"), -0.24, "unclear"),
        (Better("a", "b", "score"), -0.25, "fails"),
        (Better("a", "b", "score", margin=1), 1.25, "holds"),
        (Better("a", "b", "score", margin=1), 0.9, "unclear"),
        (Better("a", "b", "score", margin=1), 0.7, "fails"),
        (Lower("a", "b", "score"), -0.25, "holds"),
        (Lower("a", "b", "score"), 0.1, "unclear"),
        (Lower("a", "b", "score"), 0.25, "fails"),
        (Lower("a", "b", "score", margin=1), -1.25, "holds"),
        (Lower("a", "b", "score", margin=1), -0.7, "fails"),
        (Within("a", "b", "score", tolerance=0.5), 0.25, "holds"),
        (Within("a", "b", "score", tolerance=0.5), -0.25, "holds"),
        (Within("a", "b", "score", tolerance=0.5), 0.26, "unclear"),
        (Within("a", "b", "score", tolerance=0.2), 0.0, "unclear"),
        (Within("a", "b", "score", tolerance=0.5), 0.75, "fails"),
        (Within("a", "b", "score", tolerance=0.5), -0.75, "fails"),
        (AtLeast("a", "score", 1.0), 1.25, "holds"),
        (AtLeast("a", "score", 1.0), 1.2, "unclear"),
        (AtLeast("a", "score", 1.0), 0.7, "fails"),
        (AtMost("a", "score", 1.0), 0.75, "holds"),
        (AtMost("a", "score", 1.0), 0.8, "unclear"),
        (AtMost("a", "score", 1.0), 1.25, "fails"),
    ],
)
def test_the_rule(expectation: Expectation, a: float, verdict: str) -> None:
    found = expectation.judge(arms(a=[a - 0.1, a, a + 0.1], b=[0, 0, 0]))
    assert found.high - found.low == pytest.approx(2 * 0.1 * T2 / math.sqrt(3))
    assert found.verdict == verdict


def test_figures_without_noise() -> None:
    """Deterministic arms: a difference is one, no difference is no evidence, and an edge may be reached."""
    same, more = arms(a=[1, 1, 1], b=[1, 1, 1]), arms(a=[1.5, 2.5, 3.5], b=[1, 2, 3])
    assert [e("a", "b", "score").judge(more).verdict for e in (Better, Lower)] == ["holds", "fails"]
    assert Better("a", "b", "score").judge(more).pvalue == 0
    assert [e("a", "b", "score").judge(same).verdict for e in (Better, Lower)] == ["unclear", "unclear"]
    assert Better("a", "b", "score").judge(same).pvalue == 1
    assert Within("a", "b", "score", 0.0).judge(same).verdict == "holds"
    assert Within("a", "b", "score", 0.5).judge(more).verdict == "holds"
    assert AtLeast("a", "score", 1.0).judge(same).verdict == "holds"
    assert AtMost("a", "score", 1.0).judge(same).verdict == "holds"


def test_rounding_is_no_noise() -> None:
    assert Within("a", "b", "score", 1e-9).judge(arms(a=[0.1 + 0.2, 1, 1], b=[0.3, 1, 1])).verdict == "holds"


def test_a_share_is_compared_by_logarithms() -> None:
    """Ratios of e^-0.5 around 1/2 in models whose figures differ a hundredfold: no difference shows it."""
    ratios = [math.exp(-0.6), math.exp(-0.5), math.exp(-0.4)]
    figures = arms(a=[0.01 * ratios[0], ratios[1], 0.1 * ratios[2]], b=[0.01, 1, 0.1])
    assert Lower("a", "b", "score").judge(figures).verdict == "unclear"
    found = Less("a", "b", "score").judge(figures)
    assert found.effect == pytest.approx(-0.5)
    assert found.high - found.effect == pytest.approx(0.1 * T2 / math.sqrt(3))
    assert (found.verdict, found.expectation) == ("holds", "log score: a less than b")
    assert Less("a", "b", "score", share=0.2).judge(figures).verdict == "holds"  # log 0.8 = -0.22
    assert Less("a", "b", "score", share=0.3).judge(figures).verdict == "unclear"  # -0.36
    assert Less("a", "b", "score", share=0.6).judge(figures).verdict == "fails"  # -0.92
    assert Less("b", "a", "score").judge(figures).verdict == "fails"
    assert str(Less("a", "b", "score", share=0.2)) == "log score: a less than b by more than 20%"
    nothing = Less("a", "b", "score").judge(arms(a=[0, 1, 1], b=[1, 2, 2]))
    assert nothing.verdict == "unclear"
    assert math.isnan(nothing.pvalue)


def test_equivalence_has_two_one_sided_tests() -> None:
    """Mean 0.5 of a tolerance of 1 with a standard error of 0.1/√3: the nearer edge is 0.5 away."""
    t = 0.5 / (0.1 / math.sqrt(3))
    expected = 0.5 - t / (2 * math.sqrt(t * t + 2))
    within = Within("a", "b", "score", 1.0)
    assert within.judge(arms(a=[0.4, 0.5, 0.6], b=[0, 0, 0])).pvalue == pytest.approx(expected)
    assert within.judge(arms(a=[1.4, 1.5, 1.6], b=[0, 0, 0])).pvalue == pytest.approx(1 - expected)


@pytest.mark.parametrize("values", [[5.0], [5.0, NAN, 6.0]])
def test_one_seed_or_a_figure_that_is_no_number_settles_nothing(values: list[float]) -> None:
    found = AtLeast("a", "score", 1.0).judge(arms(a=values))
    assert found.verdict == "unclear"
    assert math.isnan(found.pvalue)


def test_the_verdict_of_a_study() -> None:
    def of(*verdicts: Any) -> str:
        return overall([Finding("", "", "", 0, 0, 0, 0, verdict) for verdict in verdicts])

    assert of("holds", "holds") == "holds"
    assert of("holds", "unclear") == "unclear"
    assert of("unclear", "fails", "holds") == "fails"


def test_a_figure_that_was_not_measured() -> None:
    with pytest.raises(PosttrainError, match="the arm a has no figure 'scoer'; it measured score"):
        Better("a", "b", "scoer").judge(arms(a=[1], b=[1]))


def run(seed: int, quick: bool) -> Measured:
    return Measured({})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 2}, "a study has 2 seeds; expected at least 3"),
        ({"arms": {}}, "a study needs arms and expectations"),
        ({"expectations": ()}, "a study needs arms and expectations"),
        ({"expectations": (Better("a", "c", "score"),)}, "score: a higher than c speaks of an arm 'c'; the arms are a"),
    ],
)
def test_a_study_is_checked(change: dict[str, Any], message: str) -> None:
    good = {"claim": "c", "setting": "s", "arms": {"a": Arm(run)}, "expectations": (AtLeast("a", "score", 1),)}
    assert Study(**good).seeds == 3
    with pytest.raises(PosttrainError, match=message):
        Study(**{**good, **change})
