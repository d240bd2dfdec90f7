r"""In which proportions to mix training domains, from the scores of a few training runs.

A *record* is a mixture that was trained on, with the score it led to. Heuristics make weights of the records directly;
a response surface is fitted to them and its best mixtures are proposed:

.. math:: \hat L(w) = a + b^\top w + w^\top C w

Weights sum to 1, so that a, b and C are not determined by any number of records (adding a constant to b or to C can be
undone elsewhere): least squares takes the solution of the smallest norm, and only predictions on the simplex mean
anything. Reference: MoDoMoDo, 2025, arXiv 2505.24871 (card 034).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from posttrain.trajectory import PosttrainError

Array = NDArray[np.float64]
ATTEMPTS = 200  # rounds of drawing candidates, most of which may leave the simplex


@dataclass(frozen=True)
class Record:
    """A mixture and the scores of the policy trained on it, higher is better.

    weights: by domain, in proportion; domains not named have none. outside: score on tests of domains that nothing was
    trained on; inside: on tests of the training domains.
    """

    weights: Mapping[str, float]
    outside: float
    inside: float = math.nan


def seed_mixtures(domains: Sequence[str]) -> list[dict[str, float]]:
    """The runs to begin with: every domain alone, all but each one, and all alike; one for a single domain, three for
    two (all but one is one alone), else 2m + 1."""
    names = list(domains)
    _check(bool(names) and len(set(names)) == len(names), f"mixture weights: domains are {names}; expected names")
    subsets = [{name} for name in names] + [set(names) - {name} for name in names] + [set(names)]
    distinct: list[set[str]] = []
    for subset in subsets:
        if subset and subset not in distinct:
            distinct.append(subset)
    return [{name: 1 / len(subset) for name in names if name in subset} for subset in distinct]


def matrix(records: Sequence[Record], domains: Sequence[str]) -> Array:
    """`[records, domains]` weights, each row summing to 1."""
    _check(bool(records), "mixture weights: got no record; train on a few mixtures first (seed_mixtures)")
    rows = []
    for record in records:
        unknown = sorted(set(record.weights) - set(domains))
        _check(not unknown, f"mixture weights: a record names domain {unknown[:1]}; expected some of {list(domains)}")
        row = np.array([record.weights.get(name, 0.0) for name in domains], dtype=np.float64)
        _check(bool((row >= 0).all() and row.sum() > 0), f"mixture weights: {dict(record.weights)} are no weights")
        rows.append(row / row.sum())
    return np.stack(rows)


# -- heuristics: a weight a domain, [domains] summing to 1 -----------------------------------------------------------


def collaborative(records: Sequence[Record], domains: Sequence[str], ridge: float = 1e-3) -> Array:
    """ "Coli": what a domain's presence adds to the score (ridge regression on who took part), over how much of that
    other domains explain (the variance inflation); never below 0."""
    present = (matrix(records, domains) > 0).astype(np.float64)
    inverse = np.linalg.inv(present.T @ present + ridge * np.eye(len(domains)))
    gain = inverse @ present.T @ np.array([r.outside for r in records])
    return _normalised(np.maximum(0.0, gain / np.diag(inverse)))


def additive(records: Sequence[Record], domains: Sequence[str], alpha: float = 0.5, single: float = 1.0) -> Array:
    """ "Alpha": the summed scores of the runs that a domain took part in.

    alpha: 1 looks at the scores inside alone, 0 at those outside alone. single: what a run on one domain counts.
    The domain with the smallest sum gets no weight at all.
    """
    present = (matrix(records, domains) > 0).astype(np.float64)
    present[present.sum(1) == 1] *= single

    def summed(scores: list[float]) -> Array:
        return _scaled(present.T @ np.array(scores))

    credit = np.zeros(len(domains))
    if alpha > 0:
        credit += alpha * summed([r.inside for r in records])
    if alpha < 1:
        credit += (1 - alpha) * summed([r.outside for r in records])
    _check(bool(np.isfinite(credit).all()), "mixture weights: alpha is above 0 and a record has no score inside")
    return _normalised(credit)


def leave_one_out(records: Sequence[Record], domains: Sequence[str]) -> Array:
    """ "Norm": a domain without which the others do better gets less, between 1 and 2 parts."""
    present = matrix(records, domains) > 0
    scores = []
    for i, name in enumerate(domains):
        without = [
            r.outside for r, own in zip(records, present, strict=True) if not own[i] and own.sum() == len(own) - 1
        ]
        _check(bool(without), f"mixture weights: no record leaves out {name} alone; see seed_mixtures")
        scores.append(float(np.mean(without)))
    return _normalised(0.2 - 0.1 * _scaled(np.array(scores)))


# -- the response surface --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Surface:
    """A polynomial of the weights: degree 2, or 1 for comparison. r2: on the records that were held out of its fit."""

    coefficients: Array
    degree: int
    r2: float = math.nan

    def __call__(self, weights: Array) -> Array:
        """`[mixtures, domains]` to the predicted score of each, `[mixtures]`."""
        return features(weights, self.degree) @ self.coefficients


def features(weights: Array, degree: int = 2) -> Array:
    """`[mixtures, 1 + m + m²]`: 1, w and all products of two (without those for degree 1)."""
    w = np.atleast_2d(weights)
    parts = [np.ones((len(w), 1)), w]
    if degree == 2:
        parts.append((w[:, :, None] * w[:, None, :]).reshape(len(w), -1))
    return np.concatenate(parts, 1)


def fitted(weights: Array, scores: Array, degree: int = 2) -> Surface:
    """Least squares on all records; of the many solutions the one with the smallest norm."""
    _check(degree in (1, 2), f"mixture surface: degree is {degree}; expected 1 or 2")
    found, *_ = np.linalg.lstsq(features(weights, degree), scores, rcond=1e-10)
    return Surface(np.asarray(found, dtype=np.float64), degree)


def best_of_splits(weights: Array, scores: Array, degree: int = 2, splits: int = 5, seed: int = 0) -> Surface:
    """Fits on random 80 % of the records, and of these the one that predicts the other 20 % best (the paper's rule).

    Its r2 is the best of several and therefore too good: see `heldout_r2` for an honest one. With fewer than five
    records all of them are fitted.
    """
    if len(scores) < 5:
        return fitted(weights, scores, degree)
    chance = np.random.default_rng(seed)
    test = max(2, round(0.2 * len(scores)))
    found = []
    for _ in range(splits):
        order = chance.permutation(len(scores))
        held, kept = order[:test], order[test:]
        surface = fitted(weights[kept], scores[kept], degree)
        found.append(Surface(surface.coefficients, degree, r_squared(scores[held], surface(weights[held]))))
    return max(found, key=lambda s: s.r2)


def heldout_r2(weights: Array, scores: Array, degree: int = 2) -> float:
    """Share of the scores' variance that is predicted when each record is held out in turn."""
    places = np.arange(len(scores))
    each = [fitted(weights[places != i], scores[places != i], degree)(weights[i])[0] for i in places]
    return r_squared(scores, np.array(each))


def r_squared(truth: Array, predicted: Array) -> float:
    """1 - residual / total sum of squares; without any variance 1 for an exact prediction, else -inf."""
    residual, total = float(((truth - predicted) ** 2).sum()), float(((truth - truth.mean()) ** 2).sum())
    if total == 0:
        return 1.0 if residual < 1e-18 else -math.inf
    return 1 - residual / total


def propose(
    records: Sequence[Record],
    domains: Sequence[str],
    count: int = 10,
    *,
    candidates: int = 10_000,
    degree: int = 2,
    splits: int = 5,
    seed: int = 0,
) -> Array:
    """`[count, domains]` mixtures that the surface predicts to be best (of the scores outside), best first.

    Candidates are drawn around the mixtures of the records, from one Gaussian fitted to them; those with a negative
    weight are dropped, the others scaled to sum 1.
    """
    weights = matrix(records, domains)
    if len(domains) == 1:
        return np.ones((1, 1))
    surface = best_of_splits(weights, np.array([r.outside for r in records]), degree, splits, seed)
    drawn = _candidates(weights, candidates, np.random.default_rng([seed, 1]))
    return drawn[np.argsort(-surface(drawn), kind="stable")[:count]]


def predicted_best(records: Sequence[Record], domains: Sequence[str]) -> Array:
    """The first of the surface's proposals."""
    return propose(records, domains, 1)[0]


RULES: dict[str, Callable[[Sequence[Record], Sequence[str]], Array]] = {
    "alpha": additive,
    "coli": collaborative,
    "norm": leave_one_out,
    "surface": predicted_best,
}


def named(weights: Array, domains: Sequence[str]) -> dict[str, float]:
    """Weights by domain, as samplers take them."""
    return {name: float(w) for name, w in zip(domains, weights, strict=True)}


def _candidates(weights: Array, count: int, chance: np.random.Generator) -> Array:
    mean, covariance = weights.mean(0), np.cov(weights.T, bias=True)
    found: list[Array] = [weights[:0]]
    for _ in range(ATTEMPTS):
        drawn = chance.multivariate_normal(mean, covariance, size=count, method="eigh")
        drawn = drawn[(drawn >= 0).all(1) & (drawn.sum(1) > 0)]
        found.append(drawn / drawn.sum(1, keepdims=True))
        if sum(map(len, found)) >= count:
            break
    drawn = np.concatenate(found)[:count]
    return drawn if len(drawn) else weights


def _scaled(values: Array) -> Array:
    """Between 0 (the least) and 1; all 0 where they do not differ."""
    spread = values.max() - values.min()
    return np.zeros_like(values) if spread == 0 else (values - values.min()) / spread


def _normalised(values: Array) -> Array:
    """Summing to 1; all alike where nothing speaks for any."""
    return values / values.sum() if values.sum() > 0 else np.full(len(values), 1 / len(values))


def _check(fine: bool, message: str) -> None:
    if not fine:
        raise PosttrainError(message)
