"""A grid of trainings: precisions by learning rates by seeds, and what it says about which of them are stable."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np

from posttrain.evaluation.columns import aligned
from posttrain.evaluation.sharpness import EPSILON, sharpness
from posttrain.evaluation.stability import StabilityRule
from posttrain.evaluation.task import Task
from posttrain.models.causal import CausalPolicy
from posttrain.models.simulated import SimulatedPrecision
from posttrain.training.method import Method
from posttrain.training.stage import train_stage
from posttrain.trajectory import Group, PosttrainError


@dataclass(frozen=True)
class StabilityRun:
    """One training. losses: of each step, nats. sharpness: `(step, value)` as measured. diverged: the step, if it did.

    final: the mean loss of the last window of steps, NaN where one of them is no number. lead: see `StabilityRule`.
    """

    precision: str
    rate: float
    seed: int
    losses: tuple[float, ...]
    sharpness: tuple[tuple[int, float], ...]
    diverged: int | None
    spikes: int
    lead: int | None
    final: float


@dataclass(frozen=True)
class StabilityGrid:
    """All runs of a grid."""

    runs: tuple[StabilityRun, ...]
    rule: StabilityRule = field(default_factory=StabilityRule)

    def cell(self, precision: str, rate: float) -> list[StabilityRun]:
        return [run for run in self.runs if run.precision == precision and run.rate == rate]

    @property
    def precisions(self) -> list[str]:
        return list(dict.fromkeys(run.precision for run in self.runs))

    @property
    def rates(self) -> list[float]:
        return sorted({run.rate for run in self.runs})

    def largest_stable_rate(self, precision: str) -> float:
        """The largest rate up to which no run of the precision diverged; 0 where the smallest did."""
        stable = 0.0
        for rate in self.rates:
            if any(run.diverged is not None for run in self.cell(precision, rate)):
                break
            stable = rate
        return stable

    def rows(self) -> list[tuple[str, ...]]:
        """A row a precision and rate: the share that diverged, spikes a run, final loss and its spread over seeds, the
        mean steps by which sharpness rose before the first spike."""
        found: list[tuple[str, ...]] = []
        for precision in self.precisions:
            for rate in self.rates:
                cell = self.cell(precision, rate)
                final = np.array([run.final for run in cell])
                lead = [run.lead for run in cell if run.lead is not None]
                found.append((
                    precision, f"{rate:.3g}", f"{sum(r.diverged is not None for r in cell)}/{len(cell)}",
                    f"{np.mean([r.spikes for r in cell]):.3g}", f"{final.mean():.4g}",
                    f"{final.std(ddof=1):.2g}" if len(final) > 1 else "", f"{np.mean(lead):.3g}" if lead else "",
                ))  # fmt: skip
        return found

    def __str__(self) -> str:
        table = [("precision", "rate", "diverged", "spikes", "loss", "±", "lead"), *self.rows()]
        stable = ", ".join(f"{name} {self.largest_stable_rate(name):.3g}" for name in self.precisions)
        return "\n".join([*aligned(table), f"largest stable learning rate: {stable}"])


def stability_grid(
    initial: Callable[[int], CausalPolicy],
    method: Method,
    task: Task,
    precisions: Mapping[str, SimulatedPrecision | None],
    rates: Sequence[float],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    watched: Sequence[Group] = (),
    every: int = 0,
    epsilon: float = EPSILON,
    rule: StabilityRule | None = None,
) -> StabilityGrid:
    """Train from `initial(seed)` by a method on a task in each precision at each learning rate with each seed.

    Nothing ends a run early, and no loss that is not a number does. watched: sequences whose last token's sharpness is
    measured before, every `every` steps and at the end, in the run's own precision; epsilon: of it.
    """
    if not precisions or not rates or not seeds:
        raise PosttrainError("a grid of stability needs at least one precision, learning rate and seed")
    rule = rule or StabilityRule()
    runs = [
        _run(name, precision, rate, seed, initial, method, task, watched, every, epsilon, rule)
        for name, precision in precisions.items()
        for rate in rates
        for seed in seeds
    ]
    return StabilityGrid(tuple(runs), rule)


def _run(
    name: str, precision: SimulatedPrecision | None, rate: float, seed: int, initial: Callable[[int], CausalPolicy],
    method: Method, task: Task, watched: Sequence[Group], every: int, epsilon: float, rule: StabilityRule,
) -> StabilityRun:  # fmt: skip
    def measure(policy: CausalPolicy) -> dict[str, float]:
        with precision.applied(policy) if precision is not None else nullcontext():
            return {"sharpness": sharpness(policy, watched, epsilon)}

    made = method.replace(precision=precision).with_settings(learning_rate=rate, max_skipped=1 << 62, budget=None)
    done = train_stage(
        initial(seed), made, task, seed=seed, evaluate=measure if watched else None, every=every if watched else 0
    )
    losses = tuple(m["loss"] for m in done.metrics)
    last = losses[-rule.window :]
    return StabilityRun(
        name, rate, seed, losses, tuple((p.step, p.figures["sharpness"]) for p in done.curve), rule.diverged(losses),
        len(rule.spikes(losses)), rule.lead(losses, [(p.step, p.figures["sharpness"]) for p in done.curve]),
        sum(last) / len(last) if all(math.isfinite(x) for x in last) else math.nan,
    )  # fmt: skip
