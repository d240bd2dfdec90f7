"""Schedules: coefficients that change over a stage.

A part that takes a coefficient takes a number or one of these, and asks `at(coefficient, batch)`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol


class Clock(Protocol):
    """What knows the optimizer step (from 0) and how many the stage has: a batch, a step's context."""

    step: int
    total: int


class Schedule(Protocol):
    def __call__(self, step: int, total: int) -> float:
        """Value at optimizer step `step` (from 0) of `total`."""
        ...


Coefficient = float | Schedule


def at(coefficient: Coefficient, clock: Clock) -> float:
    """The coefficient's value at the step of a batch (or of whatever has a `step` and a `total`)."""
    return coefficient(clock.step, clock.total) if callable(coefficient) else coefficient


@dataclass(frozen=True, slots=True)
class Decline:
    """A straight line down to a floor: max(start - slope * step, floor)."""

    start: float
    slope: float
    floor: float = 0.0

    def __call__(self, step: int, total: int) -> float:
        return max(self.start - self.slope * step, self.floor)


@dataclass(frozen=True, slots=True)
class Cosine:
    """A linear warm-up from 0 to `peak` over `warmup` steps, then half a cosine to `valley` over `decay` steps, then
    `valley`. `decay` None: the rest of the stage. With `warmup` and `decay` 0 it is `valley` throughout.
    """

    peak: float
    valley: float = 0.0
    warmup: int = 0
    decay: int | None = None

    def __call__(self, step: int, total: int) -> float:
        if step < self.warmup:
            return self.peak * step / self.warmup
        length = max(1, total - self.warmup) if self.decay is None else self.decay
        done = step - self.warmup
        if done >= length:
            return self.valley
        return self.valley + (self.peak - self.valley) * (1 + math.cos(math.pi * done / length)) / 2


@dataclass(frozen=True, slots=True)
class Exponential:
    """scale * exp(-step / time), time in optimizer steps; None: those of the stage."""

    scale: float
    time: float | None = None

    def __call__(self, step: int, total: int) -> float:
        return self.scale * math.exp(-step / (total if self.time is None else self.time))


@dataclass(frozen=True, slots=True)
class Complement:
    """One minus another coefficient: two terms whose weights add up to one."""

    of: Coefficient

    def __call__(self, step: int, total: int) -> float:
        return 1 - (self.of(step, total) if callable(self.of) else self.of)
