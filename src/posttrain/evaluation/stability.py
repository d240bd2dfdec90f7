"""Whether a training was stable: spikes of its loss, whether it diverged and when, and where sharpness rose before.

A loss is *high* where it lies above its own running mean by more than a threshold, or above where it began, or is no
number. The running mean takes no high loss in, so that it stays where the training was before. A run of high losses is
a *spike*; one that lasts for a whole window is a *divergence*, and no spike. Card 157 names these; the numbers are this
library's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from posttrain.trajectory import PosttrainError


@dataclass(frozen=True)
class StabilityRule:
    """decay: of the running mean. threshold: nats above it. window: steps. rise: of sharpness, as a factor of the
    least that it was before.
    """

    decay: float = 0.9
    threshold: float = 0.5
    window: int = 10
    rise: float = 2.0

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1 or not self.threshold > 0 or self.window < 2 or not self.rise > 1:
            raise PosttrainError(
                f"decay {self.decay}, threshold {self.threshold}, window {self.window}, rise {self.rise}; expected a "
                f"decay from 0 to below 1, a threshold above 0, at least 2 steps, and a rise above 1"
            )

    def high(self, losses: Sequence[float]) -> Iterator[bool]:
        """Of each step, whether its loss is high."""
        mean: float | None = None
        for loss in losses:
            above = not math.isfinite(loss)
            if not above and mean is not None:
                above = loss > mean + self.threshold or loss > losses[0]
            yield above
            if not above:
                mean = loss if mean is None else self.decay * mean + (1 - self.decay) * loss

    def runs(self, losses: Sequence[float]) -> list[tuple[int, int]]:
        """First step (from 0) and length of each run of high losses."""
        found: list[tuple[int, int]] = []
        for step, high in enumerate(self.high(losses)):
            if high and found and sum(found[-1]) == step:
                found[-1] = (found[-1][0], found[-1][1] + 1)
            elif high:
                found.append((step, 1))
        return found

    def diverged(self, losses: Sequence[float]) -> int | None:
        """The step from which losses stay high for a window (or are no numbers to the end); None where none do."""
        for begin, length in self.runs(losses):
            lost = begin + length == len(losses) and not math.isfinite(losses[-1])
            if length >= self.window or lost:
                return begin
        return None

    def spikes(self, losses: Sequence[float]) -> list[int]:
        """The steps at which spikes begin, before the training diverged if it did."""
        end = self.diverged(losses)
        return [begin for begin, _ in self.runs(losses) if end is None or begin < end]

    def lead(self, losses: Sequence[float], sharpness: Sequence[tuple[int, float]]) -> int | None:
        """Steps from the first rise of sharpness, `(step, value)` in order, to the first spike or divergence; None
        where there is neither, or no rise before it.
        """
        found = [*self.spikes(losses), *([] if (end := self.diverged(losses)) is None else [end])]
        if not found:
            return None
        least = math.inf
        for step, value in sharpness:
            if step > min(found):
                return None
            if not math.isfinite(value) or value > self.rise * least:
                return min(found) - step
            least = min(least, value)
        return None
