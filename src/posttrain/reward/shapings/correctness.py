"""Being right as the whole reward, or being right in the right form: the recipe of zero RL, and its rigid variant.

Reference: SimpleRL-Zoo, 2025, arXiv 2503.18892 (card 100).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.rollout.context import StepContext
from posttrain.trajectory import Group, PosttrainError, Trajectory

RIGID = {(True, True): 1.0, (True, False): 0.5, (False, True): -0.5, (False, False): -1.0}  # (right, well formed)
FULL = 1 - 1e-9  # of a component in [0, 1], up to rounding


@dataclass(frozen=True)
class Correctness:
    """The reward is 1 for a right completion, else 0, whatever else the task pays for.

    correct: the component that says what is right (1 is); it should read an answer in any form, or it is a format
        reward in disguise. None: the task's total.
    form: the component that says what is well formed; with it the reward is the rigid one, which the paper warns of:
        1 for right and well formed, 0.5 for right only, -0.5 for well formed only, -1 for neither.

    Logs the metrics `correct` and, with `form`, `well_formed`: shares of the step's completions.
    """

    correct: str | None = None
    form: str | None = None

    def __call__(self, groups: Sequence[Group], context: StepContext) -> None:
        members = [t for group in groups for t in group.trajectories]
        right = [self._full(t, self.correct) for t in members]
        context.metrics["correct"] = sum(right) / len(members)
        if self.form is None:
            rewards = [float(r) for r in right]
        else:
            formed = [self._full(t, self.form) for t in members]
            context.metrics["well_formed"] = sum(formed) / len(members)
            rewards = [RIGID[pair] for pair in zip(right, formed, strict=True)]
        for trajectory, reward in zip(members, rewards, strict=True):
            trajectory.reward = reward

    @staticmethod
    def _full(trajectory: Trajectory, name: str | None) -> bool:
        return (trajectory.reward if name is None else component(trajectory, name)) >= FULL


def component(trajectory: Trajectory, name: str) -> float:
    """A component of a scored trajectory's reward."""
    if name not in trajectory.rewards:
        raise PosttrainError(f"the reward has no component {name!r}; it has {', '.join(trajectory.rewards) or 'none'}")
    return trajectory.rewards[name]
