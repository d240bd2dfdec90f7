"""What a comparison of compressions found: perplexities with intervals, which differences are real, what lies on the
Pareto front of perplexity and bits; in a table and in a sentence.
"""

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
from posttrain.evaluation.statistics import RESAMPLES, holm
from posttrain.report import document
from posttrain.studies.comparison import LEVEL, accuracy, p_in_words

Table = NDArray[np.float64]
SAME = 1.05  # bits within five percent are about the same
TOLD = 4  # differences that a sentence tells
RULE = (
    "Intervals and tests resample calibration seeds and windows of text together (a bootstrap with 4,999 draws), "
    "paired: every method has the same seeds and the same windows. Two methods differ if the ratio of their "
    "perplexities is other than 1 with p < 0.05 after Holm's correction for all pairs of methods. This was fixed "
    "before the runs."
)
HEADINGS = ("method", "perplexity", "difference", "p", "KL", "accuracy", "bits", "MB", "seconds", "tokens/s")


@dataclass(frozen=True, eq=False)
class Run:
    """One method with one calibration seed.

    loss, kl: `[windows]` nats a token. correct: `[prompts]` share of right completions, where there is a task.
    bits: stored bits a packed weight. size: bytes of the model. seconds: of the compression. rate: tokens a second.
    """

    seed: int
    loss: Table
    kl: Table
    correct: Table | None
    bits: float
    size: int
    seconds: float
    rate: float


@dataclass(frozen=True, eq=False)
class Before:
    """The model as it was. bits: of a weight as it is stored."""

    loss: Table
    tokens: NDArray[np.int64]
    correct: Table | None
    bits: float
    size: int
    rate: float


@dataclass(frozen=True)
class Compressed:
    """A method: means over its seeds. front: whether no other has fewer bits and a lower perplexity."""

    name: str
    perplexity: Estimate
    by_seed: list[float]
    kl: float
    accuracy: Estimate | None
    bits: float
    size: float
    seconds: float
    rate: float
    front: bool


@dataclass(frozen=True)
class Ratio:
    """The perplexity of `method` over that of `other`. pvalue: corrected by Holm's method."""

    method: str
    other: str
    ratio: float
    low: float
    high: float
    raw_pvalue: float
    pvalue: float

    @property
    def real(self) -> bool:
        return self.pvalue < 1 - LEVEL

    @property
    def inverse(self) -> tuple[float, float, float]:
        """The perplexity of `other` over that of `method`, with its interval."""
        return 1 / self.ratio, 1 / self.high, 1 / self.low if self.low else math.inf

    def in_words(self) -> str:
        """`gptq predicts better than rtn: its perplexity is lower by 12% [9, 15], p = 0.002 after correction`."""
        lower = self.ratio < 1
        first, second = (self.method, self.other) if lower else (self.other, self.method)
        ratio, low, high = (self.ratio, self.low, self.high) if lower else self.inverse
        by, least, most = (f"{100 * (1 - share):.3g}" for share in (ratio, high, low))
        return (
            f"{first} predicts better than {second}: its perplexity is lower by {by}% [{least}, {most}], "
            f"{p_in_words(self.pvalue)} after correction"
        )


@dataclass(frozen=True, eq=False)
class CompressedComparison:
    """A finished comparison of compressions. differences: of all pairs, in the order given."""

    folder: Path
    model: str
    text: str
    calibration: str
    task: str | None
    windows: int
    seeds: int
    before: Compressed
    methods: list[Compressed]
    differences: list[Ratio]

    @property
    def page(self) -> Path:
        return self.folder / "compare.html"

    @property
    def sentence(self) -> str:
        """Which differences are real, in plain words: those between methods of about the same bits, where there are
        such, and no more than a few of them.
        """
        pairs = self.alike or self.differences
        among = " at about the same bits" if len(pairs) < len(self.differences) else ""
        real = [d.in_words() for d in pairs if d.real]
        rest = len(pairs) - len(real)
        if not pairs:
            said = f"{self.methods[0].name} alone: nothing to compare with"
        elif not real:
            both = "the two methods" if len(self.methods) == 2 else "any two methods"
            said = f"no difference in perplexity between {both}{among} is beyond the noise"
        else:
            said = "; ".join(real[:TOLD])
            more = len(real) - TOLD
            if more > 0:
                said += f"; {more} more {'differences' if more > 1 else 'difference'}{among} {_be(more)} real"
            if rest:
                said += f"; the other {'differences' if rest > 1 else 'difference'}{among} {_be(rest)} within the noise"
        if self.seeds == 1:
            said += " (with one calibration: another may say otherwise)"
        return said

    @property
    def alike(self) -> list[Ratio]:
        """The differences between methods that store about the same number of bits."""
        bits = {m.name: m.bits for m in self.methods}
        return [d for d in self.differences if abs(math.log(bits[d.method] / bits[d.other])) < math.log(SAME)]

    @property
    def remarks(self) -> list[str]:
        """What a reader must know beside the sentence."""
        found = []
        low, high = (end(m.bits for m in self.methods) for end in (min, max))
        if high > SAME * low:
            found.append(f"the methods store from {low:.2f} to {high:.2f} bits a weight: read perplexity beside them")
        if self.windows < 2:
            found.append("the text has a single window, from which nothing can be said about other text")
        return found

    def rows(self) -> list[tuple[str, ...]]:
        """The table's rows (see `headings`): the model as it was, then every method beside the first."""
        first = {d.other: d for d in self.differences if d.method == self.methods[0].name}
        return [self._row(self.before, None), *(self._row(m, first.get(m.name)) for m in self.methods)]

    def headings(self) -> tuple[str, ...]:
        named = (*HEADINGS[:2], f"over {self.methods[0].name}", *HEADINGS[3:])
        return tuple(h for h in named if h != "accuracy" or self.task is not None)

    def _row(self, m: Compressed, d: Ratio | None) -> tuple[str, ...]:
        cells = [
            m.name,
            estimate(m.perplexity),
            "" if d is None else " ".join(factor(d)),
            "" if d is None else p_in_words(d.pvalue).removeprefix("p = ").removeprefix("p "),
            "" if m is self.before else f"{m.kl:.3g}",
            *([str(m.accuracy)] if self.task is not None else []),
            f"{m.bits:.3f}" + ("*" if m.front else ""),
            f"{m.size / 1e6:.3g}" if m.size < 1e8 else f"{m.size / 1e6:.1f}",
            "" if m is self.before else f"{m.seconds:.1f}",
            f"{m.rate:.3g}",
        ]
        return tuple(cells)

    def __str__(self) -> str:
        table = [self.headings(), *self.rows()]
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        starred = "* on the Pareto front: no other method has fewer bits and a lower perplexity"
        return "\n".join([*lines, starred, *self.remarks, self.sentence])

    def to_json(self) -> str:
        whole = {
            "model": self.model, "text": self.text, "calibration": self.calibration, "task": self.task,
            "windows": self.windows, "seeds": self.seeds, "before": dataclasses.asdict(self.before),
            "methods": [dataclasses.asdict(method) for method in self.methods],
            "differences": [{**dataclasses.asdict(d), "real": d.real} for d in self.differences],
            "sentence": self.sentence, "remarks": self.remarks, "rule": RULE,
        }  # fmt: skip
        return json.dumps(document.finite(whole), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def _be(count: int) -> str:
    return "is" if count == 1 else "are"


def factor(difference: Ratio) -> tuple[str, str]:
    """The perplexity of the other method over that of the method: `0.913`, `[0.902, 0.925]`."""
    value, low, high = (f"{x:.3f}" if 0.1 <= x < 1000 else f"{x:.3g}" for x in difference.inverse)
    return value, f"[{low}, {high}]"


def estimate(found: Estimate) -> str:
    """A perplexity with its interval: `21.4 [20.9, 22.0]`."""
    return f"{found.value:.4g} [{found.low:.4g}, {found.high:.4g}]"


def judge(
    folder: Path, model: str, text: str, calibration: str, task: str | None, before: Before,
    runs: Mapping[str, Sequence[Run]],
) -> CompressedComparison:  # fmt: skip
    """What the runs say. runs: by method, of the same seeds in the same order."""
    losses = {name: np.array([run.loss for run in found]) for name, found in runs.items()}
    pairs = list(itertools.combinations(losses, 2))
    tests = [resampled(losses[a] - losses[b], before.tokens) for a, b in pairs]
    corrected = holm([test.pvalue for test in tests])
    differences = [
        Ratio(a, b, math.exp(test.mean), math.exp(test.low), math.exp(test.high), test.pvalue, p)
        for (a, b), test, p in zip(pairs, tests, corrected, strict=True)
    ]
    places = {name: (_mean(found, "bits"), float(np.average(losses[name].mean(0), weights=before.tokens)))
              for name, found in runs.items()}  # fmt: skip
    methods = [
        _compressed(name, found, losses[name], before.tokens, _on_front(name, places)) for name, found in runs.items()
    ]
    as_it_was = Compressed(
        "float", _perplexity(before.loss[None], before.tokens), [], 0.0,
        None if before.correct is None else accuracy(before.correct[None]), before.bits, before.size, 0.0, before.rate,
        front=False,
    )  # fmt: skip
    seeds = len(next(iter(losses.values())))
    return CompressedComparison(
        folder, model, text, calibration, task, len(before.loss), seeds, as_it_was, methods, differences
    )


@dataclass(frozen=True)
class Resampled:
    """A mean over seeds and windows with its interval, and the two-sided p-value of the hypothesis that it is 0."""

    mean: float
    low: float
    high: float
    pvalue: float


def resampled(values: Table, tokens: NDArray[np.int64], seed: int = 0, draws: int = RESAMPLES) -> Resampled:
    """The mean of `[seeds, windows]` values, windows weighted by their tokens, by a bootstrap that draws seeds and
    windows alike (Owen, The pigeonhole bootstrap, Annals of Applied Statistics, 2007, arXiv 0712.1111).

    A single window says nothing about other text: then the interval is open and the p-value 1.
    """
    weights = tokens / tokens.sum()
    mean = float(values.mean(0) @ weights)
    count, width = values.shape
    if width < 2:
        return Resampled(mean, -math.inf, math.inf, 1.0)
    draw = np.random.default_rng(seed)
    seeds = draw.multinomial(count, np.full(count, 1 / count), size=draws) / count
    windows = draw.multinomial(width, np.full(width, 1 / width), size=draws) * weights
    windows = windows / windows.sum(1, keepdims=True)
    means = ((seeds @ values) * windows).sum(1)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    if not np.abs(values).max() > 0:
        return Resampled(0.0, 0.0, 0.0, 1.0)
    least = min(int((means <= 0).sum()), int((means >= 0).sum()))
    return Resampled(mean, float(low), float(high), min(1.0, 2 * (least + 1) / (draws + 1)))


def _perplexity(table: Table, tokens: NDArray[np.int64]) -> Estimate:
    found = resampled(table, tokens)
    with np.errstate(over="ignore"):
        return Estimate(float(np.exp(found.mean)), float(np.exp(found.low)), float(np.exp(found.high)))


def _compressed(name: str, runs: Sequence[Run], losses: Table, tokens: NDArray[np.int64], front: bool) -> Compressed:
    correct = [run.correct for run in runs if run.correct is not None]
    return Compressed(
        name=name,
        perplexity=_perplexity(losses, tokens),
        by_seed=[float(np.exp(np.average(row, weights=tokens))) for row in losses],
        kl=float(np.average(np.mean([run.kl for run in runs], axis=0), weights=tokens)),
        accuracy=accuracy(np.array(correct)) if correct else None,
        front=front,
        **{key: _mean(runs, key) for key in ("bits", "size", "seconds", "rate")},
    )


def _mean(runs: Sequence[Run], key: str) -> float:
    return float(np.mean([getattr(run, key) for run in runs]))


def _on_front(name: str, places: Mapping[str, tuple[float, float]]) -> bool:
    """Whether no other method is at least as good in both bits and loss, and better in one. places: bits, loss."""
    bits, loss = places[name]
    return not any(b <= bits and v <= loss and (b < bits or v < loss) for b, v in places.values())
