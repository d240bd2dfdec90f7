"""A right answer earns most of its reward by the steps that lead to it.

Reference: On the Interplay of Pre-Training, Mid-Training, and RL on Reasoning Language Models, 2025, arXiv 2512.07783
(card 144).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from posttrain.reward.shapings.correctness import FULL, component
from posttrain.rollout.context import StepContext
from posttrain.trajectory import Group


@dataclass(frozen=True)
class ProcessReward:
    """0 where the answer is wrong, else `outcome` times its reward plus `process` times that of its steps.

    strict: 0 also where any step is wrong, missing or too much.
    answer, steps: the components of the reward that judge the answer and the steps, each 1 where nothing is wrong.

    Logs, where some answer is right, `process`, the mean reward of such answers' steps, and `false_right`, the share of
    them whose steps are not right.
    """

    outcome: float = 0.2
    process: float = 0.8
    strict: bool = False
    answer: str = "answer"
    steps: str = "process"

    def __call__(self, groups: Sequence[Group], context: StepContext) -> None:
        earned = []
        for group in groups:
            for trajectory in group.trajectories:
                answer, steps = component(trajectory, self.answer), component(trajectory, self.steps)
                right = answer >= FULL
                if right:
                    earned.append(steps)
                accepted = right and (steps >= FULL or not self.strict)
                trajectory.reward = self.outcome * answer + self.process * steps if accepted else 0.0
        if earned:
            context.metrics["process"] = sum(earned) / len(earned)
            context.metrics["false_right"] = sum(steps < FULL for steps in earned) / len(earned)
