r"""What a figure that was measured with several seeds on several prompts says about other seeds and other prompts."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from posttrain.evaluation.statistics import Interval
from posttrain.trajectory import PosttrainError


class Crossed(NamedTuple):
    """A mean over seeds and prompts, its interval, and the two-sided p-value of the hypothesis that it is zero."""

    mean: float
    interval: Interval
    pvalue: float


def crossed(values: ArrayLike, level: float = 0.95) -> Crossed:
    r"""Mean of a table whose rows (seeds) and columns (prompts) are both samples, by crossed random effects.

    values: `[seeds, prompts]`: a figure of each seed on each prompt, or a paired difference of two.

    .. math:: \hat V = \frac{MS_s + MS_p - MS_e}{SP}

    is the variance of the mean, with the mean squares of seeds, prompts and residual of the two-way analysis without
    replication and Satterthwaite's degrees of freedom. Where a mean square is no larger than the residual's, that
    effect is taken to be absent. With one seed only prompts count, and with one prompt only seeds: the t-test of their
    values.

    Reference: Searle, Casella and McCulloch, Variance components, 1992, chapter 4.
    """
    from scipy.stats import t

    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or not table.size:
        raise PosttrainError(f"crossed: values {list(table.shape)}; expected [seeds, prompts]")
    mean = float(table.mean())
    variance, freedom = _variance(table)
    if not freedom or not math.isfinite(variance):
        return Crossed(mean, Interval(math.nan, math.nan), math.nan)
    error = math.sqrt(variance)
    if error <= 1e-12 * max(1.0, float(np.abs(table).max())):
        return Crossed(mean, Interval(mean, mean), float(mean == 0))
    reach = float(t.ppf((1 + level) / 2, freedom)) * error
    pvalue = 2 * float(t.sf(abs(mean) / error, freedom))
    return Crossed(mean, Interval(mean - reach, mean + reach), pvalue)


def _variance(table: NDArray[np.float64]) -> tuple[float, float]:
    """Variance of the mean and its degrees of freedom; no freedom for a single value."""
    seeds, prompts = table.shape
    if min(seeds, prompts) == 1:
        count = table.size
        return (float(table.var(ddof=1)) / count, count - 1) if count > 1 else (math.nan, 0)
    rows, columns, mean = table.mean(axis=1), table.mean(axis=0), table.mean()
    between_seeds = prompts * float(((rows - mean) ** 2).sum()) / (seeds - 1)
    between_prompts = seeds * float(((columns - mean) ** 2).sum()) / (prompts - 1)
    rest = (seeds - 1) * (prompts - 1)
    residual = float(((table - rows[:, None] - columns[None] + mean) ** 2).sum()) / rest
    if between_seeds <= residual:
        return between_prompts / table.size, prompts - 1
    if between_prompts <= residual:
        return between_seeds / table.size, seeds - 1
    total = between_seeds + between_prompts - residual
    parts = between_seeds**2 / (seeds - 1) + between_prompts**2 / (prompts - 1) + residual**2 / rest
    return total / table.size, total**2 / parts
