"""The label in the group: a prompt's worked solution as one more member beside its rollouts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from posttrain.data.templates import render_completion
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.context import StepContext
from posttrain.rollout.strategies.demonstrations import scored_demonstrations
from posttrain.trajectory import Group, Prompt, Trajectory

MARKS = ",:;"


@dataclass(frozen=True, slots=True)
class Label:
    """Every group gets its prompt's worked solution (`source` "expert") as its last member (ViSurf, LUFFY, SRFT).

    align: write the solution's punctuation as the rollouts do (`spaced_alike`), so that equal content is equal tokens.
        An aligned text that scores less than the solution as given is not taken.
    """

    align: bool = False
    demonstrations: ClassVar[bool] = True

    def __call__(self, prompts: Sequence[Prompt], context: StepContext) -> list[Group]:
        groups = context.draw(prompts)
        labels = scored_demonstrations(prompts, context)
        if self.align:
            labels = [
                self._aligned(label, group, prompt, context)
                for label, group, prompt in zip(labels, groups, prompts, strict=True)
            ]
        for group, label in zip(groups, labels, strict=True):
            group.trajectories.append(label)
        return groups

    def _aligned(self, label: Trajectory, group: Group, prompt: Prompt, context: StepContext) -> Trajectory:
        text = spaced_alike(label.text, [t.text for t in group.trajectories])
        if text == label.text:
            return label
        other = rewritten(label, text, prompt, context.required_policy())
        context.score([Group([other], prompt)])
        return other if other.reward >= label.reward else label


def spaced_alike(text: str, examples: Sequence[str]) -> str:
    """`text` with a space behind its commas, colons and semicolons, or none, as most of the examples' have it.

    A mark that the examples do not hold, or hold as often with as without a space, stays as it is; so does one at the
    end of a line.
    """
    for mark in MARKS:
        inside = rf"{re.escape(mark)}(?= *[^\s])"
        spaced = sum(len(re.findall(inside + "(?= )", e)) for e in examples)
        tight = sum(len(re.findall(inside + "(?! )", e)) for e in examples)
        if spaced != tight:
            text = re.sub(inside + " *", mark + (" " if spaced > tight else ""), text)
    return text


def rewritten(solution: Trajectory, text: str, prompt: Prompt, policy: CausalPolicy) -> Trajectory:
    """The solution in other words, as the tokens of its own."""
    spoken = prompt.messages or prompt.text
    tokens, mask = render_completion(policy.tokenizer, spoken, text, chat=bool(prompt.messages))
    return replace(solution, tokens=tokens, action_mask=mask, text=text, token_source=None, rewards={}, facts={})
