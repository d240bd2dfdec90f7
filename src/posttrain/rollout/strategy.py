"""Rollout strategies: how a step's groups come about. The plain one draws a group for each prompt.

A strategy may draw in rounds, continue demonstrations, put demonstrations beside the rollouts, and leave facts for the
advantage. Each stands in a file of its own in `rollout/strategies/`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from posttrain.rollout.context import StepContext
from posttrain.trajectory import Group, PosttrainError, Prompt, Trajectory


class Strategy(Protocol):
    """Scored groups for a step's prompts. A strategy may say by class attributes what it needs:

    demonstrations: True has every prompt carry its worked solution. reference: True has the stage keep its reference.
    One with state has `state_dict` and `load_state_dict` (JSON): each run then works on its own copy.
    """

    def __call__(self, prompts: Sequence[Prompt], context: StepContext) -> list[Group]: ...


@dataclass(frozen=True, slots=True)
class Plain:
    """A group of completions for each prompt."""

    def __call__(self, prompts: Sequence[Prompt], context: StepContext) -> list[Group]:
        return context.draw(prompts)


def demonstration_of(prompt: Prompt) -> Trajectory:
    """The prompt's worked solution."""
    if prompt.demonstration is None:
        raise PosttrainError(
            f"the method imitates demonstrations, and prompt {prompt.question[:60]!r} has none; take a task whose "
            f"training problems have worked solutions"
        )
    return prompt.demonstration


def one_turn(context: StepContext, what: str) -> None:
    """Refuse tasks of several turns, where a completion is not one piece."""
    if context.environment is not None and context.environment.max_turns > 1:
        raise PosttrainError(f"{what} in tasks of one turn; this one has up to {context.environment.max_turns}")
