"""Which prompts the policy solves: a fact for parts that treat unsolved prompts differently."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.objective.teacher import SOLVED
from posttrain.rollout.context import StepContext
from posttrain.trajectory import Group


@dataclass(frozen=True, slots=True)
class Solved:
    """Leaves the fact `solved`: how many of the group's rollouts earn `success`, up to rounding. Changes no reward."""

    success: float = 1.0

    def __call__(self, groups: Sequence[Group], context: StepContext) -> None:
        for group in groups:
            solved = sum(t.reward >= self.success - 1e-6 for t in group.trajectories if t.source == "policy")
            for trajectory in group.trajectories:
                trajectory.facts[SOLVED] = float(solved)
