r"""Rollout workers beside a trainer, simulated event by event: how much a cluster trains, and where it saturates.

Completions are numbered in the order in which they start; those of training step :math:`s` are the
:math:`s`-th :math:`B`. A worker decodes a number of completions at once and takes the next as soon as one is done. With
the staleness bound :math:`K` a completion of step :math:`s` starts only when the weights of update :math:`s-K` are out,
so that none is trained on more than :math:`K` updates after the weights that it started with. The trainer takes the
steps in order, each when its last completion is there:

.. math:: \mathrm{start}_j = \max(\text{a free slot},\ \mathrm{end}_{s-1-K} + \mathrm{sync}),\qquad
          \mathrm{end}_s = \max(\max_{j\in s}\mathrm{done}_j,\ \mathrm{end}_{s-1}) + \mathrm{update}

K = 0 is synchronous training, K = 1 draws a step's completions while the one before is trained on. What decides: the
trainer, :math:`B/\mathrm{update}` completions a second; the workers, slots over the mean time of a completion; and the
longest completion :math:`R` of a step, since :math:`K+1` steps take at least :math:`R+\mathrm{update}`.
"""

from __future__ import annotations

import heapq
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from posttrain.trajectory import PosttrainError

SATURATED = 0.95  # of the most that any number of workers reached


@dataclass(frozen=True, slots=True)
class Service:
    """Service times, in seconds, as measured on one worker and one trainer.

    update: of a training step, signals included. token: of a token of one completion when all of a worker's `slots` are
    taken. completions: of a training step. sync: until the workers have an update's weights; they go on drawing
    meanwhile. prefill: before a completion's first token.
    """

    update: float
    token: float
    completions: int
    slots: int = 64
    sync: float = 0.0
    prefill: float = 0.0

    def __post_init__(self) -> None:
        for name, low in (("update", 0), ("token", 0), ("completions", 1), ("slots", 1), ("sync", 0), ("prefill", 0)):
            value = getattr(self, name)
            if not value >= low or value == float("inf"):
                raise PosttrainError(f"{name} is {value}; expected a finite number from {low}")
        if self.update == self.token == 0:
            raise PosttrainError("update and token are both 0 seconds; give the measured time of at least one")

    @property
    def training_bound(self) -> float:
        """Completions a second that the trainer takes when it never waits."""
        return self.completions / self.update if self.update else float("inf")

    def rollout_bound(self, workers: int, tokens: float) -> float:
        """Completions a second that workers draw when they never wait, at `tokens` a completion on average."""
        each = self.prefill + self.token * tokens
        return workers * self.slots / each if each else float("inf")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a simulated run came to, the first steps left out while the pipeline fills.

    throughput: completions a second. step: seconds between updates. trainer, rollout: shares of the time in which the
    trainer, and the workers' slots, were at work. staleness: updates between the weights that a completion started with
    and those that it was trained on, mean and most. ends: when each update ended, from the run's start.
    """

    throughput: float
    step: float
    trainer: float
    rollout: float
    staleness: float
    stalest: int
    ends: tuple[float, ...]


def simulate(times: Service, workers: int, staleness: int, tokens: NDArray[np.float64], warmup: int = 0) -> Outcome:
    """Run as many steps as `tokens` has rows: `[steps, completions]`, the length of each completion in tokens.

    warmup: steps at the start that the figures leave out.
    """
    steps, count = tokens.shape
    if workers < 1 or staleness < 0 or count != times.completions or not 0 <= warmup < steps:
        raise PosttrainError(
            f"a simulation of {workers} workers, staleness {staleness}, {steps} steps of {count} completions and "
            f"{warmup} to warm up; expected at least 1 worker, no negative staleness, {times.completions} completions "
            f"a step, and more steps than warm up"
        )
    service = times.prefill + times.token * tokens
    # more slots than completions that may be under way would never be taken
    free = [0.0] * min(workers * times.slots, (staleness + 1) * count)
    ends: list[float] = []
    began: list[NDArray[np.float64]] = []
    for step in range(steps):
        gate = ends[step - 1 - staleness] + times.sync if step > staleness else 0.0
        starts, done = np.empty(count), 0.0
        for j, seconds in enumerate(service[step].tolist()):
            start = max(free[0], gate)
            heapq.heapreplace(free, start + seconds)
            starts[j] = start
            done = max(done, start + seconds)
        began.append(starts)
        ends.append(max(done, ends[-1] if ends else 0.0) + times.update)
    return _outcome(times, workers, service, ends, began, warmup)


def _outcome(
    times: Service, workers: int, service: NDArray[np.float64], ends: list[float],
    began: list[NDArray[np.float64]], warmup: int,
) -> Outcome:  # fmt: skip
    steps = len(ends)
    elapsed = ends[-1] - (ends[warmup - 1] if warmup else 0.0)
    counted = steps - warmup
    published = [end + times.sync for end in ends]
    behind = [
        step - bisect_right(published, start) for step in range(warmup, steps) for start in began[step].tolist()
    ]  # fmt: skip
    return Outcome(
        throughput=counted * times.completions / elapsed,
        step=elapsed / counted,
        trainer=counted * times.update / elapsed,
        rollout=float(service[warmup:].sum()) / (workers * times.slots * elapsed),
        staleness=sum(behind) / len(behind),
        stalest=max(behind),
        ends=tuple(ends),
    )


# Lengths


@dataclass(frozen=True, slots=True)
class Completions:
    """How long completions are. mean: tokens; spread: standard deviation over mean of a lognormal (0: all alike);
    longest: where they are cut off. measured: lengths to draw from in place of all that.
    """

    mean: float = 512.0
    spread: float = 0.5
    longest: float | None = None
    measured: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.measured and not min(self.measured) > 0:
            raise PosttrainError(f"a measured length is {min(self.measured)}; expected tokens, at least 1")
        if not (self.mean > 0 and self.spread >= 0) or (self.longest is not None and not self.longest > 0):
            raise PosttrainError(
                f"completions of {self.mean} tokens, spread {self.spread}, at most {self.longest}; expected a positive "
                f"mean and longest, and a spread from 0"
            )

    def draw(self, steps: int, completions: int, seed: int) -> NDArray[np.float64]:
        """`[steps, completions]` tokens. The same random numbers whatever mean and spread are, so that two
        simulations differ by what they are asked to differ in alone.
        """
        noise = np.random.default_rng(seed)
        if self.measured:
            return noise.choice(np.asarray(self.measured, dtype=np.float64), (steps, completions))
        width = np.log1p(self.spread**2) ** 0.5
        tokens = self.mean * np.exp(width * noise.standard_normal((steps, completions)) - width**2 / 2)
        return tokens if self.longest is None else np.minimum(tokens, self.longest)


# Sweeps


@dataclass(frozen=True, slots=True)
class Point:
    """One simulated cluster."""

    workers: int
    staleness: int
    spread: float
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Curve:
    """Throughput against the number of workers, at one staleness and spread.

    saturates: the fewest workers that reach 95 % of the most that any number reached; share: of the training bound that
    they then have.
    """

    staleness: int
    spread: float
    points: tuple[Point, ...]
    saturates: int
    share: float


def sweep(
    times: Service, completions: Completions, workers: Sequence[int], staleness: Sequence[int],
    spreads: Sequence[float], *, steps: int = 40, seed: int = 0, progress: Callable[[int, int], None] | None = None,
) -> list[Curve]:  # fmt: skip
    """Simulate every combination; a curve for each staleness and spread (measured lengths have their own spread)."""
    if completions.measured:
        values = np.asarray(completions.measured)
        spreads = [float(values.std() / values.mean())]
    warmup = steps // 4
    curves: list[Curve] = []
    total, done = len(spreads) * len(staleness) * len(workers), 0
    for spread in spreads:
        shape = completions if completions.measured else replace(completions, spread=spread)
        tokens = shape.draw(steps, times.completions, seed)
        for bound in staleness:
            points = []
            for count in sorted(set(workers)):
                points.append(Point(count, bound, spread, simulate(times, count, bound, tokens, warmup)))
                done += 1
                if progress is not None:
                    progress(done, total)
            curves.append(_curve(times, bound, spread, tuple(points)))
    return curves


def _curve(times: Service, staleness: int, spread: float, points: tuple[Point, ...]) -> Curve:
    most = max(p.outcome.throughput for p in points)
    first = next(p for p in points if p.outcome.throughput >= SATURATED * most)
    return Curve(staleness, spread, points, first.workers, first.outcome.throughput / times.training_bound)
