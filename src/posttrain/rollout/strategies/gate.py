"""The gate: a prompt's worked solution is brought in only where the policy's own tries succeed too rarely."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from posttrain.rollout.context import StepContext
from posttrain.rollout.strategies.demonstrations import scored_demonstrations
from posttrain.trajectory import Group, PosttrainError, Prompt, Trajectory


@dataclass(frozen=True, slots=True)
class Gate:
    """Prompts of whose rollouts fewer than `fewer` succeeded get their demonstration, prompt by prompt: beside the
    rollouts (AHPO, card 038) or, with `instead`, in their place (HPT, card 046).

    success: the reward that counts as success, up to rounding. component: of this component of the reward, where it has
        several; None for the total.

    Logs `gated`, the share of prompts that got their demonstration, and `reward`, the mean over all rollouts, also
    those that were dropped. A prompt without a worked solution keeps its rollouts alone.
    """

    fewer: int = 1
    instead: bool = False
    success: float = 1.0
    component: str | None = None
    demonstrations: ClassVar[bool] = True

    def __call__(self, prompts: Sequence[Prompt], context: StepContext) -> list[Group]:
        groups = context.draw(prompts)
        opened = [g for g in groups if self.opens(g.trajectories) and _prompt(g).demonstration is not None]
        drawn = [t.reward for g in groups for t in g.trajectories]
        context.metrics |= {"gated": len(opened) / len(groups), "reward": sum(drawn) / len(drawn)}
        for group, solution in zip(opened, scored_demonstrations([_prompt(g) for g in opened], context), strict=True):
            group.trajectories = [solution] if self.instead else [*group.trajectories, solution]
        return groups

    def opens(self, rollouts: Sequence[Trajectory]) -> bool:
        """Whether fewer than `fewer` of a prompt's rollouts succeeded."""
        return sum(self._earned(t) >= self.success - 1e-6 for t in rollouts) < self.fewer

    def _earned(self, rollout: Trajectory) -> float:
        if self.component is None:
            return rollout.reward
        if self.component not in rollout.rewards:
            raise PosttrainError(
                f"the reward has no component {self.component!r}; expected one of {', '.join(rollout.rewards)}"
            )
        return rollout.rewards[self.component]


def _prompt(group: Group) -> Prompt:
    assert group.prompt is not None
    return group.prompt
