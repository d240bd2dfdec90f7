"""From measurements to figures: rates, ratios with their spread, memory, distance from the roofline."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.measurement import Arm, Measurement
from benchmarks.roofline import Size, step_work
from benchmarks.workload import Case


@dataclass(slots=True)
class CaseResult:
    """All measurements of a case. repeated: TRL's by arm, one for each of ours; screened: all its arms, once each."""

    case: Case
    ours: list[Measurement]
    repeated: dict[Arm, list[Measurement]]
    screened: dict[Arm, Measurement]

    @property
    def compared(self) -> list[Arm]:
        """TRL's fastest arm that computes the batch at once, and its fastest of all where that is another.

        The first is the one with a target. Online there is no such difference: a batch of rollouts is meant to be cut.
        """
        at_once = fastest({a: m for a, m in self.repeated.items() if self.case.online or a.pieces == 1})
        return list(dict.fromkeys([at_once, fastest(self.repeated)]))


@dataclass(frozen=True, slots=True)
class Figure:
    """A rate of both sides, one value a repetition (the higher the better), and the ratio asked for, if one is."""

    case: str
    unit: str
    ours: list[float]
    trl: list[float]
    target: float | None = None

    @property
    def ratios(self) -> list[float]:
        """Ours over TRL's, repetition by repetition."""
        return [a / b for a, b in zip(self.ours, self.trl, strict=True)]

    @property
    def met(self) -> bool:
        return self.target is None or statistics.median(self.ratios) >= self.target


def fastest(arms: Mapping[Arm, Sequence[Measurement]]) -> Arm:
    """The arm with the shortest step, by the median of its measurements."""
    return min(arms, key=lambda arm: statistics.median(m.mean_seconds for m in arms[arm]))


def figures(result: CaseResult, arm: Arm) -> list[Figure]:
    """The rates of a case beside an arm of TRL; the first has a target, where the arm is the one to compare with."""
    case, sides = result.case, (result.ours, result.repeated[arm])
    target = case.target if arm == result.compared[0] else None

    def both(rate: Callable[[Measurement], float]) -> tuple[list[float], list[float]]:
        ours, trl = ([rate(m) for m in side] for side in sides)
        return ours, trl

    if not case.online:
        return [Figure(case.name, "tokens/s", *both(lambda m: m.tokens / sum(m.seconds)), target)]
    return [
        Figure(case.name, "steps/min", *both(lambda m: 60 / m.mean_seconds), target),
        Figure(case.name, "completion tokens/s", *both(lambda m: m.completion_tokens / sum(m.seconds))),
    ]


def roofline_seconds(case: Case, measured: Measurement, size: Size, throughput: float) -> float:
    """Seconds a step of this measurement would take at the matrix throughput."""
    work = [step_work(size, groups, case.passes) for groups in measured.groups]
    return sum(work) / len(work) / throughput


def distance(case: Case, measured: Sequence[Measurement], size: Size, throughput: float) -> float:
    """How many times longer than its roofline a step takes (median over repetitions)."""
    return statistics.median(m.mean_seconds / roofline_seconds(case, m, size, throughput) for m in measured)


def peak_mib(measured: Sequence[Measurement]) -> float:
    return max(m.peak_mib for m in measured)


def record(result: CaseResult, throughput: float) -> dict[str, Any]:
    """A case as plain data, for the JSON file."""
    case, about = result.case, result.ours[0].about
    size = Size(**about["size"])
    seconds = roofline_seconds(case, result.ours[0], size, throughput)
    return {
        "figures": [
            {
                "trl_arm": str(arm), "unit": f.unit, "ours": f.ours, "trl": f.trl, "target": f.target,
                "ratio": {"each": f.ratios, "median": statistics.median(f.ratios),
                          "min": min(f.ratios), "max": max(f.ratios)},
            }
            for arm in result.compared
            for f in figures(result, arm)
        ],
        "peak_mib": {"ours": peak_mib(result.ours), **{str(a): peak_mib(m) for a, m in result.repeated.items()}},
        "roofline": {
            "work_per_step": seconds * throughput, "seconds_per_step": seconds,
            "ours": distance(case, result.ours, size, throughput),
            "trl": {str(a): distance(case, m, size, throughput) for a, m in result.repeated.items()},
        },
        "ours": {"precision": about["precision"], "repetitions": [_measured(m) for m in result.ours]},
        "trl": {
            "repetitions": {str(arm): [_measured(m) for m in found] for arm, found in result.repeated.items()},
            "screened": {str(arm): _measured(m) for arm, m in result.screened.items()},
        },
    }  # fmt: skip


def _measured(m: Measurement) -> dict[str, Any]:
    """A measurement without its sequences, but with what they add up to."""
    found: dict[str, Any] = {
        "seconds": m.seconds, "seconds_per_step": m.mean_seconds, "peak_mib": m.peak_mib, "threads": m.threads,
        "sequences": m.completions, "tokens": m.tokens, "tokens_per_sequence": m.tokens / m.completions,
        "first_loss": m.first_loss,
    }  # fmt: skip
    if any(m.rewards):
        rewards = [r for step in m.rewards for r in step]
        found["completion_length"] = m.completion_tokens / m.completions
        found["reward"] = sum(rewards) / len(rewards)
        found["undecided"] = undecided(m)
    return found


def undecided(m: Measurement) -> float:
    """Share of the groups whose completions all earned the same, so that they have no gradient."""
    spread: list[float] = []
    for groups, rewards in zip(m.groups, m.rewards, strict=True):
        start = 0
        for _, parts in groups:
            earned = rewards[start : start + len(parts)]
            spread.append(max(earned) - min(earned))
            start += len(parts)
    return sum(s < 1e-9 for s in spread) / len(spread)
