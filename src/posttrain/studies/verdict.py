r"""What is expected of a study's arms, and whether it came true.

The rule, fixed before any run: an expectation names a region in which an effect should lie. The effect is a mean over
seeds with its 95 % t-interval; arms are compared seed by seed (paired). The expectation

- `holds` when the whole interval lies inside the region,
- `fails` when the whole interval lies outside of it,
- is `unclear` otherwise: the effect is within the noise.

A study holds if all of its expectations do, fails if one does, and is unclear otherwise. With one seed there is no
interval, and everything is unclear.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from posttrain.evaluation.statistics import Interval
from posttrain.trajectory import PosttrainError

LEVEL = 0.95
Verdict = Literal["holds", "fails", "unclear"]
Figures = Mapping[str, Sequence[Mapping[str, float]]]  # arm -> the figures of each seed, in one order of seeds

RULE = (
    "The effect is a mean over seeds, paired where two arms are compared, with its 95 % t-interval. An expectation "
    "holds when the whole interval lies inside the region that it names, fails when the whole interval lies outside of "
    "it, and is unclear otherwise. The study holds if all expectations hold, fails if one fails, else it is unclear."
)


@dataclass(frozen=True, slots=True)
class Finding:
    """What became of an expectation. effect: a mean over seeds in the figure's unit, with its 95 % interval.

    pvalue: two-sided t-test of the region's edge; for `Within` the larger of two one-sided tests. NaN for one seed.
    """

    expectation: str
    metric: str
    why: str
    effect: float
    low: float
    high: float
    pvalue: float
    verdict: Verdict


class Region(NamedTuple):
    """Where an effect should lie: between `low` and `high`; `closed` counts the ends as inside."""

    low: float
    high: float
    closed: bool = False


class Expectation(ABC):
    """One statement about a figure of an arm, or about its difference from another arm's. `str` says it in words."""

    __slots__ = ()
    arm: str
    metric: str
    why: str

    @property
    def other(self) -> str | None:
        """The arm it is compared with, if any."""
        return None

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms it speaks of."""
        return (self.arm,) if self.other is None else (self.arm, self.other)

    @property
    @abstractmethod
    def region(self) -> Region: ...

    def judge(self, figures: Figures) -> Finding:
        """Whether it came true. Raises PosttrainError where an arm did not measure the figure."""
        values = self.effects(figures)
        mean, interval = student(values)
        verdict, pvalue = _verdict(interval, self.region), _pvalue(values, self.region)
        return Finding(str(self), self.metric, self.why, mean, *interval, pvalue, verdict)

    def effects(self, figures: Figures) -> list[float]:
        """What the region speaks of, one value a seed: the figure, or its difference from the other arm's."""
        values = by_seed(figures, self.arm, self.metric)
        if self.other is None:
            return values
        return [a - b for a, b in zip(values, by_seed(figures, self.other, self.metric), strict=True)]


@dataclass(frozen=True, slots=True)
class Better(Expectation):
    """`arm` has a higher figure than `than`, by more than `margin`."""

    arm: str
    than: str
    metric: str
    margin: float = 0.0
    why: str = ""

    @property
    def other(self) -> str:
        return self.than

    @property
    def region(self) -> Region:
        return Region(self.margin, math.inf)

    def __str__(self) -> str:
        return f"{self.metric}: {self.arm} higher than {self.than}{_by(self.margin)}"


@dataclass(frozen=True, slots=True)
class Lower(Expectation):
    """`arm` has a lower figure than `than`, by more than `margin`."""

    arm: str
    than: str
    metric: str
    margin: float = 0.0
    why: str = ""

    @property
    def other(self) -> str:
        return self.than

    @property
    def region(self) -> Region:
        return Region(-math.inf, -self.margin)

    def __str__(self) -> str:
        return f"{self.metric}: {self.arm} lower than {self.than}{_by(self.margin)}"


@dataclass(frozen=True, slots=True)
class Less(Expectation):
    """`arm` has a smaller figure than `than`, by more than a `share` of it: for figures that are positive, and large in
    some models and small in others. The effect is the mean logarithm of their ratio.
    """

    arm: str
    than: str
    metric: str
    share: float = 0.0
    why: str = ""

    @property
    def other(self) -> str:
        return self.than

    @property
    def region(self) -> Region:
        return Region(-math.inf, math.log1p(-self.share))

    def effects(self, figures: Figures) -> list[float]:
        pairs = zip(by_seed(figures, self.arm, self.metric), by_seed(figures, self.than, self.metric), strict=True)
        return [math.log(a / b) if a > 0 and b > 0 else math.nan for a, b in pairs]

    def __str__(self) -> str:
        by = f" by more than {self.share:.0%}" if self.share else ""
        return f"log {self.metric}: {self.arm} less than {self.than}{by}"


@dataclass(frozen=True, slots=True)
class Within(Expectation):
    """`arm` and `of` have the same figure, give or take `tolerance` (equivalence)."""

    arm: str
    of: str
    metric: str
    tolerance: float
    why: str = ""

    @property
    def other(self) -> str:
        return self.of

    @property
    def region(self) -> Region:
        return Region(-self.tolerance, self.tolerance, closed=True)

    def __str__(self) -> str:
        return f"{self.metric}: {self.arm} within ±{self.tolerance:g} of {self.of}"


@dataclass(frozen=True, slots=True)
class AtLeast(Expectation):
    """The figure of `arm` is `value` or more."""

    arm: str
    metric: str
    value: float
    why: str = ""

    @property
    def region(self) -> Region:
        return Region(self.value, math.inf, closed=True)

    def __str__(self) -> str:
        return f"{self.metric}: {self.arm} at least {self.value:g}"


@dataclass(frozen=True, slots=True)
class AtMost(Expectation):
    """The figure of `arm` is `value` or less."""

    arm: str
    metric: str
    value: float
    why: str = ""

    @property
    def region(self) -> Region:
        return Region(-math.inf, self.value, closed=True)

    def __str__(self) -> str:
        return f"{self.metric}: {self.arm} at most {self.value:g}"


def overall(findings: Sequence[Finding]) -> Verdict:
    """The verdict of a study."""
    verdicts = {finding.verdict for finding in findings}
    if "fails" in verdicts:
        return "fails"
    return "holds" if verdicts == {"holds"} else "unclear"


def student(values: Sequence[float], level: float = LEVEL) -> tuple[float, Interval]:
    """Mean and t-interval of independent values; the ends are NaN for a single one, and all of it where one is NaN."""
    from scipy.stats import t

    data = np.asarray(values, dtype=np.float64)
    mean = float(data.mean())
    if len(data) < 2 or not np.isfinite(data).all():
        return mean, Interval(math.nan, math.nan)
    reach = float(t.ppf((1 + level) / 2, len(data) - 1)) * _standard_error(data)
    return mean, Interval(mean - reach, mean + reach)


def by_seed(figures: Figures, arm: str, metric: str) -> list[float]:
    """A figure of an arm, one value a seed."""
    found = []
    for seed in figures[arm]:
        if metric not in seed:
            raise PosttrainError(f"the arm {arm} has no figure {metric!r}; it measured {', '.join(seed) or 'nothing'}")
        found.append(float(seed[metric]))
    return found


def _verdict(interval: Interval, region: Region) -> Verdict:
    low, high = interval
    inside = region.low < low and high < region.high
    if inside or (region.closed and region.low <= low and high <= region.high):
        return "holds"
    return "fails" if high < region.low or low > region.high else "unclear"


def _pvalue(values: Sequence[float], region: Region) -> float:
    """Of the hypothesis that the mean lies on the region's edge (two-sided); of the hypothesis that it lies outside,
    where a region has two edges (the larger of two one-sided tests). Without any noise it is 0 or 1.
    """
    from scipy.stats import t

    data = np.asarray(values, dtype=np.float64)
    if len(data) < 2 or not np.isfinite(data).all():
        return math.nan
    mean, error = float(data.mean()), _standard_error(data)

    def tail(distance: float) -> float:
        """The chance of a mean this far on the inner side of an edge, were the edge the truth."""
        if error == 0:
            return 0.0 if distance > 0 else 0.5 if distance == 0 else 1.0
        return float(t.sf(distance / error, len(data) - 1))

    if math.isfinite(region.low) and math.isfinite(region.high):
        return max(tail(mean - region.low), tail(region.high - mean))
    return 2 * tail(abs(mean - (region.low if math.isfinite(region.low) else region.high)))


def _standard_error(data: np.ndarray) -> float:
    """Of the mean; 0 for values that differ by no more than rounding."""
    deviation = float(data.std(ddof=1))
    return 0.0 if deviation <= 1e-12 * max(1.0, float(np.abs(data).max())) else deviation / math.sqrt(len(data))


def _by(margin: float) -> str:
    return f" by more than {margin:g}" if margin else ""
