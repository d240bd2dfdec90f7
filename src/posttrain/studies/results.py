"""What a study came to: every arm's figures with intervals, what became of the expectations, and the verdict."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

from posttrain.report.document import finite
from posttrain.studies.runner import Plan, Record
from posttrain.studies.study import Curve
from posttrain.studies.verdict import Finding, Verdict, overall, student


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of one arm: a value a seed, their mean and its 95 % t-interval (NaN ends for one seed)."""

    values: list[float]
    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ArmResult:
    """figures: by name. rollouts, tokens, seconds: of training, over all seeds."""

    figures: dict[str, Figure]
    rollouts: int
    tokens: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Result:
    """A study's outcome. seeds: how many; date, machine, versions: of the runs, the last where they differ.

    rollouts_per_second: over all arms that sample, by their training time; None where none does.
    curves: arm -> name -> a curve a seed; for the picture, not part of the JSON.
    """

    study: str
    methods: tuple[str, ...]
    family: str
    card: tuple[str, ...]
    paper: str
    claim: str
    setting: str
    text: str
    notes: str
    seeds: int
    quick: bool
    arms: dict[str, ArmResult]
    expectations: list[Finding]
    verdict: Verdict
    seconds: float
    rollouts_per_second: float | None
    date: str
    machine: str
    versions: dict[str, str]
    curves: dict[str, dict[str, list[Curve]]]

    @property
    def named(self) -> list[str]:
        """The figures that the expectations speak of."""
        return list(dict.fromkeys(f.metric for f in self.expectations))

    @property
    def others(self) -> list[str]:
        """All other figures that an arm has, by name."""
        return sorted({name for arm in self.arms.values() for name in arm.figures} - set(self.named))

    @property
    def effect(self) -> str:
        """What was found, in a sentence an expectation."""
        return "; ".join(
            f"{f.expectation}: {interval(f.effect, f.low, f.high, signed=True)} ({f.verdict})"
            for f in self.expectations
        )

    def to_json(self) -> str:
        """Without the curves; what is not finite is null."""
        whole = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "curves"}
        whole["arms"] = {name: dataclasses.asdict(arm) for name, arm in self.arms.items()}
        whole["expectations"] = [dataclasses.asdict(finding) for finding in self.expectations]
        whole["effect"] = self.effect
        return json.dumps(finite(whole), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def result_of(plan: Plan, records: Mapping[str, list[Record]]) -> Result:
    """Judge a study by what its jobs found."""
    entry, study = plan.entry, plan.study
    figures = {arm: [record.measured.figures for record in runs] for arm, runs in records.items()}
    findings = [expectation.judge(figures) for expectation in study.expectations]
    every = [record for runs in records.values() for record in runs]
    newest = max(every, key=lambda record: record.date)
    sampling = [r.measured for r in every if r.measured.rollouts]
    spent = sum(m.seconds for m in sampling)
    return Result(
        study=entry.name,
        methods=entry.methods,
        family=entry.family,
        card=entry.cards,
        paper=entry.paper,
        claim=study.claim,
        setting=study.setting,
        text=entry.text,
        notes=study.notes,
        seeds=len(every) // len(records),
        quick=plan.quick,
        arms={arm: _arm(runs) for arm, runs in records.items()},
        expectations=findings,
        verdict=overall(findings),
        seconds=sum(record.measured.seconds for record in every),
        rollouts_per_second=sum(m.rollouts for m in sampling) / spent if spent else None,
        date=newest.date,
        machine=newest.machine,
        versions=newest.versions,
        curves={arm: _curves(runs) for arm, runs in records.items()},
    )


def number(value: float, signed: bool = False) -> str:
    """Three digits of a figure: `0.417`, `+0.042`, `12,300`."""
    if not math.isfinite(value):
        return "none"
    sign = "+" if signed else ""
    return f"{value:{sign},.0f}" if abs(value) >= 1000 else f"{value:{sign}.3g}"


def interval(value: float, low: float, high: float, signed: bool = False) -> str:
    """`+0.042 [0.011, 0.073]`; the value alone where there is no interval."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return number(value, signed)
    return f"{number(value, signed)} [{number(low)}, {number(high)}]"


def _arm(runs: list[Record]) -> ArmResult:
    measured = [record.measured for record in runs]
    shared = [name for name in measured[0].figures if all(name in m.figures for m in measured)]
    figures = {}
    for name in shared:
        values = [float(m.figures[name]) for m in measured]
        mean, (low, high) = student(values)
        figures[name] = Figure(values, mean, low, high)
    return ArmResult(
        figures,
        sum(m.rollouts for m in measured),
        sum(m.tokens for m in measured),
        sum(m.seconds for m in measured),
    )


def _curves(runs: list[Record]) -> dict[str, list[Curve]]:
    names = dict.fromkeys(name for record in runs for name in record.measured.curves)
    return {name: [r.measured.curves[name] for r in runs if r.measured.curves.get(name)] for name in names}
