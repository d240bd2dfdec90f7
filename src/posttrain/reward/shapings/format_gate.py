"""No reward at all without the right form.

Reference: MoDoMoDo, 2025, arXiv 2505.24871 (card 034).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.rollout.context import StepContext
from posttrain.trajectory import Group, PosttrainError


@dataclass(frozen=True, slots=True)
class FormatGate:
    """The reward is 0 where its component `component` is not above 0."""

    component: str = "format"

    def __call__(self, groups: Sequence[Group], context: StepContext) -> None:
        for group in groups:
            for trajectory in group.trajectories:
                if self.component not in trajectory.rewards:
                    raise PosttrainError(
                        f"format gate: the reward has no component {self.component!r}; it has "
                        f"{', '.join(trajectory.rewards) or 'none'}"
                    )
                if not trajectory.rewards[self.component] > 0:
                    trajectory.reward = 0.0
