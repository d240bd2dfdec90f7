"""Mixture weights from a few runs: heuristics by hand, and a surface that finds the best of a known function."""

from __future__ import annotations

import math

import numpy as np
import pytest

from posttrain.data.mixture_weights import (
    RULES,
    Record,
    additive,
    best_of_splits,
    collaborative,
    features,
    fitted,
    heldout_r2,
    leave_one_out,
    matrix,
    named,
    propose,
    r_squared,
    seed_mixtures,
)
from posttrain.trajectory import PosttrainError

DOMAINS = ["a", "b", "c"]
BEST = np.array([0.5, 0.3, 0.2])


def quadratic(weights: np.ndarray) -> np.ndarray:
    """1 at BEST, less with the squared distance from it, some directions more than others."""
    away = np.atleast_2d(weights) - BEST
    return 1 - (away**2 * np.array([1.0, 2.0, 0.5])).sum(1) - 0.3 * away[:, 0] * away[:, 1]


def random_mixtures(count: int, seed: int = 0, size: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).dirichlet(np.ones(size), count)


def records(weights: np.ndarray, noise: float = 0.0) -> list[Record]:
    scores = quadratic(weights) + noise * np.random.default_rng(1).standard_normal(len(weights))
    return [Record(named(w, DOMAINS), float(s)) for w, s in zip(weights, scores, strict=True)]


SEEDS = [Record(w, inside=i, outside=o) for w, i, o in zip(
    seed_mixtures(DOMAINS), (0.1, 0.2, 0.4, 0.5, 0.7, 0.3, 0.6), (0.30, 0.10, 0.20, 0.35, 0.45, 0.15, 0.50), strict=True
)]  # fmt: skip


def test_the_runs_to_begin_with() -> None:
    runs = seed_mixtures(DOMAINS)
    assert len(runs) == 7
    assert runs[:3] == [{"a": 1.0}, {"b": 1.0}, {"c": 1.0}]
    assert runs[3:6] == [{"b": 0.5, "c": 0.5}, {"a": 0.5, "c": 0.5}, {"a": 0.5, "b": 0.5}]
    assert runs[6] == dict.fromkeys(DOMAINS, pytest.approx(1 / 3))
    assert len(seed_mixtures(["a", "b"])) == 3
    assert seed_mixtures(["a"]) == [{"a": 1.0}]


def test_a_quadratic_function_is_found_exactly() -> None:  # (a)
    weights = random_mixtures(14)
    surface = best_of_splits(weights, quadratic(weights))
    np.testing.assert_allclose(surface(weights), quadratic(weights), atol=1e-9)
    assert surface.r2 == pytest.approx(1)
    fresh = random_mixtures(50, seed=9)
    np.testing.assert_allclose(surface(fresh), quadratic(fresh), atol=1e-9)


def test_the_best_mixture_is_found() -> None:
    exact = propose(records(random_mixtures(14)), DOMAINS, 3)
    assert abs(exact[0] - BEST).max() < 0.03
    assert np.all(np.diff(quadratic(exact)) <= 1e-12), "best first"
    noisy = propose(records(random_mixtures(30), noise=0.02), DOMAINS, 1)
    assert abs(noisy[0] - BEST).max() < 0.1


def test_from_the_seed_runs_alone_the_surface_is_underdetermined_and_still_useful() -> None:
    runs = matrix([Record(w, 0.0) for w in seed_mixtures(DOMAINS)], DOMAINS)
    surface = fitted(runs, quadratic(runs))
    np.testing.assert_allclose(surface(runs), quadratic(runs), atol=1e-9)
    shifted = surface.coefficients.copy()
    shifted[0] += 1
    shifted[1:4] -= 1  # a constant moved from b to a: the same on the simplex
    np.testing.assert_allclose(features(runs) @ shifted, surface(runs), atol=1e-9)
    assert np.linalg.norm(shifted) > np.linalg.norm(surface.coefficients), "the smallest of all solutions is taken"


def test_a_quadratic_surface_predicts_what_a_linear_one_cannot() -> None:
    weights = random_mixtures(24)
    scores = np.array([r.outside for r in records(weights, noise=0.01)])
    assert heldout_r2(weights, scores, 2) > 0.9
    assert heldout_r2(weights, scores, 2) - heldout_r2(weights, scores, 1) > 0.2
    linear = weights @ np.array([0.2, 0.5, 0.1])
    assert heldout_r2(weights, linear, 1) == pytest.approx(1)


def test_one_domain_leaves_no_choice() -> None:  # (b)
    assert propose([Record({"a": 1.0}, 0.3)], ["a"], 1).tolist() == [[1.0]]
    assert collaborative([Record({"a": 1.0}, 0.3)], ["a"]).tolist() == [1.0]


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_weights_are_shares(rule) -> None:  # type: ignore[no-untyped-def]  # (c)
    weights = rule(SEEDS, DOMAINS)
    assert weights.shape == (3,)
    assert (weights >= 0).all()
    assert weights.sum() == pytest.approx(1)


def test_all_proposals_are_shares_near_what_was_seen() -> None:
    found = propose(SEEDS, DOMAINS, 10)
    assert found.shape == (10, 3)
    assert (found >= 0).all()
    np.testing.assert_allclose(found.sum(1), 1)
    assert propose(SEEDS, DOMAINS, 10).tolist() == found.tolist()


def test_alpha_by_hand() -> None:
    outside = np.array([0.30 + 0.45 + 0.15 + 0.50, 0.10 + 0.35 + 0.15 + 0.50, 0.20 + 0.35 + 0.45 + 0.50])
    scaled = (outside - outside.min()) / (outside.max() - outside.min())
    np.testing.assert_allclose(additive(SEEDS, DOMAINS, alpha=0.0), scaled / scaled.sum())
    assert additive(SEEDS, DOMAINS, alpha=0.0)[1] == 0, "the least gets nothing"
    inside = np.array([0.5 * 0.1 + 0.7 + 0.3 + 0.6, 0.5 * 0.2 + 0.5 + 0.3 + 0.6, 0.5 * 0.4 + 0.5 + 0.7 + 0.6])
    scaled = (inside - inside.min()) / (inside.max() - inside.min())
    np.testing.assert_allclose(additive(SEEDS, DOMAINS, alpha=1.0, single=0.5), scaled / scaled.sum())
    with pytest.raises(PosttrainError, match="no score inside"):
        additive([Record({"a": 1.0}, 0.2), Record({"b": 1.0}, 0.1)], ["a", "b"])


def test_norm_by_hand() -> None:
    scaled = np.array([(0.35 - 0.15) / 0.3, 1.0, 0.0])  # without a 0.35, without b 0.45, without c 0.15
    expected = 0.2 - 0.1 * scaled
    np.testing.assert_allclose(leave_one_out(SEEDS, DOMAINS), expected / expected.sum())
    with pytest.raises(PosttrainError, match="no record leaves out a alone"):
        leave_one_out(SEEDS[:3], DOMAINS)


def test_coli_by_hand() -> None:
    # two domains, each alone and both: X'X = [[2, 1], [1, 2]], inverse [[2, -1], [-1, 2]] / 3
    runs = [Record({"a": 1}, 0.6), Record({"b": 1}, 0.1), Record({"a": 1, "b": 1}, 0.5)]
    gain = np.array([2 * 1.1 - 0.6, 2 * 0.6 - 1.1]) / 3
    np.testing.assert_allclose(collaborative(runs, ["a", "b"], ridge=0.0), gain / gain.sum())
    harmful = [Record({"a": 1}, 0.6), Record({"b": 1}, -0.1), Record({"a": 1, "b": 1}, 0.2)]
    assert collaborative(harmful, ["a", "b"]).tolist() == [1.0, 0.0]


def test_r_squared() -> None:
    truth = np.array([1.0, 2.0, 3.0])
    assert r_squared(truth, truth) == 1
    assert r_squared(truth, np.full(3, 2.0)) == 0
    assert r_squared(np.ones(2), np.zeros(2)) == -math.inf


def test_records_must_fit() -> None:
    with pytest.raises(PosttrainError, match="got no record"):
        matrix([], DOMAINS)
    with pytest.raises(PosttrainError, match="domain \\['z'\\]"):
        matrix([Record({"z": 1.0}, 0.1)], DOMAINS)
    with pytest.raises(PosttrainError, match="are no weights"):
        matrix([Record({"a": -1.0}, 0.1)], DOMAINS)
