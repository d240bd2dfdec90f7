"""What an evaluation may claim: intervals, unbiased pass@k, and paired tests of two models on the same prompts.

Every random number here comes from a generator made of the `seed` argument; global random state is never touched.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from posttrain.trajectory import PosttrainError

RESAMPLES = 4999  # of a bootstrap or permutation test: the Monte Carlo error of a 95% bound is then far below its width
_CELLS = 2_000_000  # resampled values held at once


class Interval(NamedTuple):
    """A two-sided confidence interval; both ends are NaN where the data cannot give one (a single prompt)."""

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Paired:
    """Two models on the same prompts.

    difference: mean of `b` minus mean of `a` (positive: `b` is better), with a paired bootstrap interval.
    pvalue: two-sided, of the hypothesis that the two are the same. n: prompts. test: how the p-value was computed.
    """

    difference: float
    low: float
    high: float
    pvalue: float
    n: int
    test: str

    def __str__(self) -> str:
        interval = f"[{100 * self.low:+.1f}, {100 * self.high:+.1f}]"
        test = f"p = {self.pvalue:.3g} ({self.test}, n={self.n})"
        return f"difference {100 * self.difference:+.1f} points {interval}, {test}"


def wilson(successes: int, n: int, level: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion: `successes` of `n` independent trials."""
    from scipy.stats import binomtest

    _check_level(level)
    if not 0 <= successes <= n or n < 1:
        raise PosttrainError(
            f"wilson: got {successes} successes of {n} trials; expected 0 <= successes <= n and n >= 1"
        )
    interval = binomtest(successes, n).proportion_ci(level, method="wilson")
    return Interval(float(interval.low), float(interval.high))


def bootstrap(
    values: ArrayLike,
    clusters: ArrayLike | None = None,
    level: float = 0.95,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """Percentile bootstrap interval of the mean of `values`, resampling whole clusters.

    values: `[n]` float. clusters: `[n]`, the cluster (prompt) of each value; None makes every value its own cluster.
    Samples of one prompt are not independent: resampling prompts, not samples, keeps the interval honest.
    """
    _check_level(level)
    data = np.asarray(values, dtype=np.float64)
    labels = np.arange(len(data)) if clusters is None else np.asarray(clusters)
    if data.ndim != 1 or labels.shape != data.shape or not len(data):
        raise PosttrainError(
            f"bootstrap: values {list(data.shape)} and clusters {list(labels.shape)}; expected one shape [n], n >= 1"
        )
    _, index = np.unique(labels, return_inverse=True)
    counts = np.bincount(index)
    sums = np.bincount(index, weights=data)
    if len(counts) < 2:
        return Interval(math.nan, math.nan)
    generator = np.random.default_rng(seed)
    means = []
    for rows in _batches(resamples, len(counts)):
        drawn = generator.integers(len(counts), size=(rows, len(counts)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(low), float(high))


def pass_at_k(n: int, c: int, k: int) -> float:
    r"""Unbiased estimate of the chance that one of `k` samples is right, from `c` right ones of `n`.

    .. math:: 1 - \binom{n-c}{k} / \binom{n}{k}

    computed as a product, so that no binomial overflows (Chen et al., 2021, arXiv 2107.03374).
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise PosttrainError(f"pass@k: got n={n}, c={c}, k={k}; expected 0 <= c <= n and 1 <= k <= n samples")
    if n - c < k:
        return 1.0
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1)))


def paired_test(a: ArrayLike, b: ArrayLike, level: float = 0.95, seed: int = 0, resamples: int = RESAMPLES) -> Paired:
    """Compare two models on the same prompts, in the same order.

    a, b: `[n]` or `[n, samples]`, a value for each sample (the number of samples may differ).
    With one 0/1 value a prompt the test is McNemar's, exact; otherwise the prompts' mean differences have their signs
    flipped at random (all sign patterns where these are at most `resamples`).
    """
    first, second = (np.asarray(x, dtype=np.float64) for x in (a, b))
    first, second = (x[:, None] if x.ndim == 1 else x for x in (first, second))
    if first.ndim != 2 or second.ndim != 2 or len(first) != len(second) or not first.size or not second.size:
        raise PosttrainError(
            f"paired test: {list(np.shape(a))} and {list(np.shape(b))}; expected [n] or [n, samples] of one n >= 1"
        )
    differences = second.mean(axis=1) - first.mean(axis=1)
    single = first.shape[1] == second.shape[1] == 1
    if single and np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all():
        pvalue, test = _mcnemar(differences), "exact McNemar"
    else:
        pvalue, test = _sign_flip(differences, seed, resamples), "sign-flip permutation"
    low, high = bootstrap(differences, level=level, seed=seed, resamples=resamples)
    return Paired(float(differences.mean()), low, high, pvalue, len(differences), test)


def holm(pvalues: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given: compare each with the family-wise level."""
    order = sorted(range(len(pvalues)), key=lambda i: pvalues[i])
    adjusted = [0.0] * len(pvalues)
    largest = 0.0
    for rank, i in enumerate(order):
        if not 0 <= pvalues[i] <= 1:
            raise PosttrainError(f"holm: got p-value {pvalues[i]!r}; expected numbers from 0 to 1")
        largest = max(largest, min(1.0, (len(pvalues) - rank) * pvalues[i]))
        adjusted[i] = largest
    return adjusted


def _mcnemar(differences: NDArray[np.float64]) -> float:
    """Exact McNemar: of the prompts on which the models disagree, each is as likely to win as the other."""
    from scipy.stats import binomtest

    wins, losses = int((differences > 0).sum()), int((differences < 0).sum())
    return 1.0 if wins + losses == 0 else float(binomtest(wins, wins + losses).pvalue)


def _sign_flip(differences: NDArray[np.float64], seed: int, resamples: int) -> float:
    """Two-sided p-value of the mean under random signs; prompts without a difference do not matter."""
    changed = np.abs(differences[differences != 0])
    if not len(changed):
        return 1.0
    observed = abs(differences.sum())
    tolerance = 1e-9 * changed.sum()  # sums of the same numbers in another order differ in the last bits
    exact = len(changed) < 63 and 2 ** len(changed) <= resamples
    total = 2 ** len(changed) if exact else resamples
    generator = np.random.default_rng(seed)
    start, extreme = 0, 0
    for rows in _batches(total, len(changed)):
        if exact:
            bits = (np.arange(start, start + rows)[:, None] >> np.arange(len(changed))) & 1
        else:
            bits = generator.integers(2, size=(rows, len(changed)))
        extreme += int((np.abs((2 * bits - 1) @ changed) >= observed - tolerance).sum())
        start += rows
    return extreme / total if exact else (extreme + 1) / (total + 1)


def _batches(rows: int, width: int) -> Iterable[int]:
    """Row counts that add up to `rows`, none of which needs more than `_CELLS` values of `width` columns."""
    step = max(1, _CELLS // width)
    return (min(step, rows - start) for start in range(0, rows, step))


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise PosttrainError(f"interval: level is {level!r}; expected a number between 0 and 1 such as 0.95")
