r"""What training on tasks one after the other does to the earlier ones.

.. math:: \mathrm{AvgAcc} = \frac1K \sum_j a_{K,j},\qquad
          \mathrm{FM} = \frac{1}{K-1}\sum_{j<K} (a_{K,j} - a_{j,j})

:math:`a_{i,j}` is the accuracy on task j after training on task i. Reference: Reinforcement Fine-Tuning Naturally
Mitigates Forgetting in Continual Post-Training, 2025, arXiv 2507.05386 (card 004).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from posttrain.trajectory import PosttrainError


@dataclass(frozen=True)
class Continual:
    """Accuracies on a sequence of tasks.

    tasks: names, in the order of training. after: `[K, K]` in [0, 1], row i after training on task i; what was not
    measured is NaN (the tasks that were yet to come need not be). before: `[K]`, the same before any of it.
    """

    tasks: tuple[str, ...]
    after: NDArray[np.float64]
    before: NDArray[np.float64] | None = None

    @classmethod
    def of(cls, tasks: Sequence[str], after: ArrayLike, before: ArrayLike | None = None) -> Continual:
        """From anything like an array. Raises PosttrainError where shapes do not fit, or a needed value is missing."""
        matrix = np.asarray(after, dtype=np.float64)
        if not tasks or matrix.shape != (len(tasks), len(tasks)):
            raise PosttrainError(
                f"continual: accuracies of shape {list(matrix.shape)} for {len(tasks)} tasks; expected a row and a "
                f"column a task"
            )
        if np.isnan(np.concatenate([np.diag(matrix), matrix[-1]])).any():
            raise PosttrainError(
                "continual: the accuracy of a task right after its training, or at the end, is missing"
            )
        start = None if before is None else np.asarray(before, dtype=np.float64)
        if start is not None and start.shape != (len(tasks),):
            raise PosttrainError(f"continual: {start.size} accuracies before training for {len(tasks)} tasks")
        return cls(tuple(tasks), matrix, start)

    @property
    def average(self) -> float:
        """AvgAcc: mean accuracy over all tasks at the end."""
        return float(self.after[-1].mean())

    @property
    def learned(self) -> float:
        """Mean accuracy on each task right after its own training."""
        return float(np.diag(self.after).mean())

    @property
    def forgetting(self) -> float:
        """FM: mean change of the earlier tasks since their own training; below 0 they were forgotten. NaN for one."""
        if len(self.tasks) < 2:
            return math.nan
        return float((self.after[-1] - np.diag(self.after))[:-1].mean())

    def curve(self, task: str) -> list[float]:
        """The accuracy on a task after each training, the first value before any of it where that was measured."""
        if task not in self.tasks:
            raise PosttrainError(f"continual: no task {task!r}; the tasks are {', '.join(self.tasks)}")
        column = self.tasks.index(task)
        start = [] if self.before is None else [float(self.before[column])]
        return start + [float(x) for x in self.after[:, column]]
