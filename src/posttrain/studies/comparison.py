"""What a comparison found: accuracies with intervals, which differences are real, in a table and in a sentence."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from posttrain.evaluation.evaluation import Estimate
from posttrain.evaluation.statistics import Interval, holm, paired_test, wilson
from posttrain.report import document
from posttrain.studies.budget import Budget
from posttrain.studies.crossed import Crossed, crossed
from posttrain.studies.study import Curve

LEVEL = 0.95
FULL = 0.95  # the share of a budget that counts as all of it
RULE = (
    "Intervals and tests take seeds and held-out prompts both as samples (crossed random effects), so that they speak "
    "of other seeds and other prompts. Two methods differ if the paired difference has p < 0.05 after Holm's "
    "correction for all pairs of methods. This was fixed before the runs."
)


@dataclass(frozen=True, eq=False)
class Run:
    """One method with one seed. correct: `[prompts]`, the share of right completions of each held-out problem.

    curves: by name (`accuracy`, `reward`, ...). seconds, tokens, rollouts, steps: of training.
    """

    seed: int
    correct: NDArray[np.float64]
    curves: dict[str, Curve]
    seconds: float
    tokens: int
    rollouts: int
    steps: int


@dataclass(frozen=True)
class Compared:
    """A method: its accuracy over seeds and prompts, each seed's own, and what a run of it spent on average."""

    name: str
    accuracy: Estimate
    by_seed: list[float]
    seconds: float
    tokens: float
    rollouts: float
    steps: float
    share: float  # of the budget that was used


@dataclass(frozen=True)
class Difference:
    """The accuracy of `method` minus that of `other`, paired by seed and prompt. pvalue: corrected by Holm's method."""

    method: str
    other: str
    difference: float
    low: float
    high: float
    raw_pvalue: float
    pvalue: float

    @property
    def real(self) -> bool:
        return self.pvalue < 1 - LEVEL

    def in_words(self) -> str:
        """`riskpo beats grpo by 4.1 points [1.0, 7.2], p = 0.01 after correction`."""
        first, second, sign = (self.method, self.other, 1) if self.difference > 0 else (self.other, self.method, -1)
        low, high = sorted((sign * self.low, sign * self.high))
        return (
            f"{first} beats {second} by {100 * sign * self.difference:.1f} points [{100 * low:.1f}, {100 * high:.1f}], "
            f"{p_in_words(self.pvalue)} after correction"
        )


@dataclass(frozen=True, eq=False)
class Comparison:
    """A finished comparison. before: of the model as it was. differences: of all pairs, in the order given."""

    folder: Path
    model: str
    task: str
    budget: Budget
    prompts: int
    seeds: int
    before: Estimate
    methods: list[Compared]
    differences: list[Difference]
    runs: Mapping[str, Sequence[Run]]

    @property
    def page(self) -> Path:
        return self.folder / "compare.html"

    @property
    def sentence(self) -> str:
        """Which differences are real, in plain words."""
        real = [d.in_words() for d in self.differences if d.real]
        rest = len(self.differences) - len(real)
        if not self.differences:
            said = f"{self.methods[0].name} alone: nothing to compare with"
        elif not real:
            both = "the two methods" if len(self.methods) == 2 else "any two methods"
            said = f"no difference between {both} is beyond the noise"
        elif rest:
            said = "; ".join(real) + f"; the other difference{'s are' if rest > 1 else ' is'} within the noise"
        else:
            said = "; ".join(real)
        if self.seeds == 1:
            said += " (with one seed a method: another seed may say otherwise)"
        return said

    @property
    def remarks(self) -> list[str]:
        """What a reader must know beside the sentence."""
        uneven = [m for m in self.methods if not FULL <= m.share <= 2 - FULL]
        return [f"{m.name} spent {100 * m.share:.0f}% of its budget" for m in uneven]

    def rows(self) -> list[tuple[str, ...]]:
        """The table's rows (see `HEADINGS`): every method, and its difference from the first."""
        found: list[tuple[str, ...]] = [("before", str(self.before), "", "", "", "", "")]
        first = {d.other: d for d in self.differences if d.method == self.methods[0].name}
        for method in self.methods:
            d = first.get(method.name)
            found.append((
                method.name,
                str(method.accuracy),
                "" if d is None else points(-d.difference, -d.high, -d.low),
                "" if d is None else p_in_words(d.pvalue).removeprefix("p = ").removeprefix("p "),
                f"{method.seconds:,.0f}",
                f"{method.tokens:,.0f}",
                f"{method.rollouts:,.0f}",
            ))  # fmt: skip
        return found

    def __str__(self) -> str:
        headings = (*HEADINGS[:2], f"minus {self.methods[0].name}", *HEADINGS[3:])
        table = [headings, *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(len(headings))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        return "\n".join([*lines, *self.remarks, self.sentence])

    def to_json(self) -> str:
        whole = {
            "model": self.model, "task": self.task, "budget": str(self.budget), "prompts": self.prompts,
            "seeds": self.seeds, "before": dataclasses.asdict(self.before),
            "methods": [dataclasses.asdict(method) for method in self.methods],
            "differences": [{**dataclasses.asdict(d), "real": d.real} for d in self.differences],
            "sentence": self.sentence, "remarks": self.remarks, "rule": RULE,
        }  # fmt: skip
        return json.dumps(document.finite(whole), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


HEADINGS = ("method", "held-out accuracy", "difference", "p", "seconds", "tokens", "rollouts")


def judge(
    folder: Path, model: str, task: str, budget: Budget, before: NDArray[np.float64], runs: Mapping[str, Sequence[Run]]
) -> Comparison:
    """What the runs say. before: `[prompts]`; runs: by method, of the same seeds in the same order."""
    tables = {name: np.array([run.correct for run in found]) for name, found in runs.items()}
    pairs = list(itertools.combinations(tables, 2))
    tests = [_paired(tables[a], tables[b]) for a, b in pairs]
    corrected = holm([test.pvalue for test in tests])
    differences = [
        Difference(a, b, test.mean, *test.interval, test.pvalue, p)
        for (a, b), test, p in zip(pairs, tests, corrected, strict=True)
    ]
    methods = [_compared(name, found, tables[name], budget) for name, found in runs.items()]
    count = len(next(iter(tables.values())))
    return Comparison(
        folder, model, task, budget, len(before), count, accuracy(before[None]), methods, differences, runs
    )


def accuracy(table: NDArray[np.float64]) -> Estimate:
    """The mean of `[seeds, prompts]` shares; by Wilson's interval over prompts where all or none are right."""
    total, prompts = float(table.mean()), table.shape[1]
    if total in (0.0, 1.0):
        return Estimate(total, *wilson(round(total * prompts), prompts, LEVEL))
    mean, (low, high), _ = crossed(table, LEVEL)
    return Estimate(mean, max(low, 0.0), min(high, 1.0)) if math.isfinite(low) else Estimate(mean, low, high)


def _paired(first: NDArray[np.float64], second: NDArray[np.float64]) -> Crossed:
    """The difference of two methods, both `[seeds, prompts]`.

    Where it is the same everywhere it has no spread to learn from: then each method's own interval gives the
    difference's (Newcombe, Statistics in Medicine, 1998, method 10), and the test is that of signs over prompts. One
    seed with one prompt says nothing.
    """
    test = crossed(first - second, LEVEL)
    if math.isnan(test.pvalue):
        return test._replace(pvalue=1.0)
    if test.interval.low < test.interval.high:
        return test
    a, b = accuracy(first), accuracy(second)
    below, above = math.hypot(a.value - a.low, b.high - b.value), math.hypot(a.high - a.value, b.value - b.low)
    interval = Interval(test.mean - below, test.mean + above)
    return Crossed(test.mean, interval, paired_test(second.T, first.T, LEVEL).pvalue)


def points(value: float, low: float, high: float) -> str:
    """A difference of shares in percentage points: `+4.1 [+1.0, +7.2]`."""
    number, start, end = (f"{round(100 * share, 1) + 0.0:+.1f}" for share in (value, low, high))  # no -0.0
    return f"{number} [{start}, {end}]"


def p_in_words(pvalue: float) -> str:
    return "p < 0.001" if pvalue < 0.001 else f"p = {pvalue:.2g}"


def _compared(name: str, runs: Sequence[Run], table: NDArray[np.float64], budget: Budget) -> Compared:
    spent = {unit: float(np.mean([getattr(run, unit) for run in runs])) for unit in ("seconds", "tokens", "rollouts")}
    return Compared(
        name=name,
        accuracy=accuracy(table),
        by_seed=[float(share) for share in table.mean(axis=1)],
        steps=float(np.mean([run.steps for run in runs])),
        share=spent[budget.unit] / budget.amount,
        **spent,
    )
