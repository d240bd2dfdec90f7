"""Demonstrations in a step: scored as rollouts are, in the place of some prompts' rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from posttrain.rollout.context import StepContext
from posttrain.rollout.strategy import demonstration_of
from posttrain.trajectory import Group, PosttrainError, Prompt, Trajectory


def scored_demonstrations(prompts: Sequence[Prompt], context: StepContext) -> list[Trajectory]:
    """Each prompt's worked solution, scored; a copy, since the same prompt is taken again in later epochs."""
    found = [replace(demonstration_of(prompt), rewards={}, facts={}) for prompt in prompts]
    context.score([Group([solution], prompt) for solution, prompt in zip(found, prompts, strict=True)])
    return found


@dataclass(frozen=True, slots=True)
class Interleaved:
    """Rollouts for some of a step's prompts, demonstrations for the others (CHORD, card 009).

    share: of demonstrations in the step's sequences, 0 to below 1: with B prompts and G rollouts a prompt, the last
        :math:`e = sGB / (1 + s(G-1))` prompts (rounded, at least 1 where s > 0) are demonstrated instead of tried.
    """

    share: float = 0.2
    demonstrations: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise PosttrainError(f"the share of demonstrations is {self.share}; expected a number from 0 to below 1")

    def demonstrated(self, prompts: int, group: int) -> int:
        """How many of a step's prompts are demonstrated."""
        if not self.share:
            return 0
        exact = self.share * group * prompts / (1 + self.share * (group - 1))
        return min(max(1, round(exact)), prompts - 1)

    def __call__(self, prompts: Sequence[Prompt], context: StepContext) -> list[Group]:
        if self.share and len(prompts) < 2:
            raise PosttrainError("a step with rollouts and demonstrations needs 2 prompts; raise batch")
        border = len(prompts) - self.demonstrated(len(prompts), context.group)
        tried, shown = prompts[:border], prompts[border:]
        solutions = scored_demonstrations(shown, context)
        return context.draw(tried) + [Group([s], p) for s, p in zip(solutions, shown, strict=True)]
