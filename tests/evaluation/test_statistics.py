from __future__ import annotations

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy import stats

from posttrain.evaluation.statistics import bootstrap, holm, paired_test, pass_at_k, wilson
from posttrain.trajectory import PosttrainError


def test_wilson_by_formula() -> None:
    n, successes, z = 200, 87, 1.959963984540054
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert wilson(successes, n) == pytest.approx((centre - half, centre + half))
    assert wilson(0, 10).low == 0
    assert wilson(0, 10).high == pytest.approx(z * z / (10 + z * z))


@given(st.integers(1, 400), st.data(), st.floats(0.5, 0.99))
@settings(deadline=None, max_examples=50)
def test_wilson_holds_the_estimate_and_mirrors(n: int, data: st.DataObject, level: float) -> None:
    successes = data.draw(st.integers(0, n))
    low, high = wilson(successes, n, level)
    assert 0 <= low <= successes / n <= high <= 1
    mirrored = wilson(n - successes, n, level)
    assert mirrored == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_bootstrap_agrees_with_scipy() -> None:
    values = np.random.default_rng(0).exponential(size=60)
    expected = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=4999, rng=np.random.default_rng(1)
    ).confidence_interval
    assert bootstrap(values) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_bootstrap_of_two_clusters_by_enumeration() -> None:
    """Means of resampled clusters {0, 0, 0} and {1}: both first 0, both second 1, one of each 1/4."""
    low, high = bootstrap([0, 0, 0, 1], [5, 5, 5, 9], level=0.4, resamples=3000)
    assert (low, high) == (0.25, 0.25)  # the middle 40% of masses 1/4, 1/2, 1/4
    assert bootstrap([0, 0, 0, 1], [5, 5, 5, 9], level=0.9, resamples=3000) == (0, 1)


def test_repeating_samples_of_a_prompt_does_not_narrow_the_interval() -> None:
    values = np.random.default_rng(3).integers(2, size=40).astype(float)
    once = bootstrap(values)
    copied = bootstrap(np.repeat(values, 8), np.repeat(np.arange(40), 8))
    assert copied == once
    ignored = bootstrap(np.repeat(values, 8))
    assert ignored.high - ignored.low < 0.6 * (once.high - once.low)


def test_bootstrap_in_batches_covers_every_resample(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).normal(size=50)
    whole = bootstrap(values, seed=4)
    monkeypatch.setattr("posttrain.evaluation.statistics._CELLS", 997)
    assert bootstrap(values, seed=4) == pytest.approx(whole)


def test_one_cluster_gives_no_interval() -> None:
    assert all(math.isnan(end) for end in bootstrap([0.0, 1.0, 1.0], [7, 7, 7]))


@given(st.integers(1, 8), st.data())
@settings(deadline=None, max_examples=40)
def test_pass_at_k_by_enumeration(n: int, data: st.DataObject) -> None:
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    outcomes = [i < c for i in range(n)]
    draws = list(itertools.combinations(outcomes, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws))


@given(st.integers(1, 300), st.data())
@settings(deadline=None, max_examples=50)
def test_pass_at_k_starts_at_the_accuracy_and_grows(n: int, data: st.DataObject) -> None:
    c = data.draw(st.integers(0, n))
    values = [pass_at_k(n, c, k) for k in range(1, n + 1)]
    assert values[0] == pytest.approx(c / n)
    assert all(later >= now - 1e-12 for now, later in itertools.pairwise(values))
    assert all(0 <= value <= 1 for value in values)
    assert values[-1] == pytest.approx(float(c > 0))


def test_pass_at_k_of_many_samples_stays_finite() -> None:
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5)


def test_mcnemar_by_hand() -> None:
    """Nine prompts won, two lost: 2 · P(X ≤ 2) with X ~ Binomial(11, 1/2)."""
    a = np.array([0] * 9 + [1] * 2 + [1] * 5 + [0] * 4)
    b = np.array([1] * 9 + [0] * 2 + [1] * 5 + [0] * 4)
    result = paired_test(a, b)
    assert result.pvalue == pytest.approx(2 * sum(math.comb(11, i) for i in range(3)) / 2**11)
    assert result.difference == pytest.approx(7 / 20)
    assert result.low < result.difference < result.high
    assert (result.n, result.test) == (20, "exact McNemar")
    assert str(result).startswith("difference +35.0 points [+")
    assert paired_test(b, a).difference == pytest.approx(-7 / 20)


def test_sign_flips_by_enumeration_and_scipy() -> None:
    generator = np.random.default_rng(2)
    a, b = generator.random((8, 4)), generator.random((8, 4)) + 0.1
    differences = (b - a).mean(axis=1)
    flipped = [abs(np.dot(signs, differences)) for signs in itertools.product((-1, 1), repeat=8)]
    expected = np.mean([value >= abs(differences.sum()) - 1e-12 for value in flipped])
    result = paired_test(a, b)
    assert result.pvalue == pytest.approx(expected)
    assert result.test == "sign-flip permutation"
    reference = stats.permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert result.pvalue == pytest.approx(reference.pvalue)


def test_many_prompts_are_sampled_close_to_the_normal_limit() -> None:
    generator = np.random.default_rng(5)
    a = generator.random(400)
    b = a + generator.normal(0.02, 0.2, size=400)
    result = paired_test(a, b)
    assert result.pvalue == pytest.approx(stats.ttest_rel(a, b).pvalue, abs=0.02)
    assert paired_test(a, b) == result  # a fixed seed
    assert paired_test(a, a + 1).pvalue == pytest.approx(1 / 5000)  # never zero


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=10))
@settings(deadline=None, max_examples=40)
def test_the_paired_test_is_symmetric(pairs: list[tuple[int, int]]) -> None:
    assume(any(a != b for a, b in pairs))
    a, b = (np.array(x) / 4 for x in zip(*pairs, strict=True))
    forward, backward = paired_test(a, b, resamples=1999), paired_test(b, a, resamples=1999)
    assert forward.pvalue == pytest.approx(backward.pvalue)
    assert forward.difference == pytest.approx(-backward.difference)
    assert 0 < forward.pvalue <= 1


def test_the_same_model_twice_differs_by_nothing() -> None:
    result = paired_test([0, 1, 1], [0, 1, 1])
    assert (result.difference, result.low, result.high, result.pvalue) == (0, 0, 0, 1)
    assert paired_test([[0.5, 1]], [[1, 0.5]]).pvalue == 1


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_global_random_state_is_left_alone() -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    paired_test(np.linspace(0, 1, 30), np.linspace(0, 1, 30) ** 2)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before  # type: ignore[index]  # noqa: NPY002


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wilson(3, 2), "3 successes of 2"),
        (lambda: wilson(0, 0), "n >= 1"),
        (lambda: wilson(1, 2, level=95), "level is 95"),
        (lambda: bootstrap([]), "n >= 1"),
        (lambda: bootstrap([1, 2], [1]), "one shape"),
        (lambda: pass_at_k(4, 2, 5), "k=5"),
        (lambda: pass_at_k(4, 5, 1), "c=5"),
        (lambda: paired_test([1, 0], [1]), "of one n"),
        (lambda: paired_test([], []), "n >= 1"),
        (lambda: holm([0.5, 1.5]), "1.5"),
    ],
)
def test_bad_arguments_are_one_line_errors(call, message: str) -> None:
    with pytest.raises(PosttrainError, match=message):
        call()
