r"""A second group on a perturbed prompt: how much does the policy need what the perturbation takes away?

The twin's completions are scored and thrown away; what stays is the share of them that is right.
References: T-GRPO of Video-R1, 2025, arXiv 2503.21776; TimeHC-RL, 2025, arXiv 2505.24500 (card 015).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from posttrain.data.templates import render_prompt
from posttrain.rollout.context import StepContext
from posttrain.rollout.outcome import Right
from posttrain.trajectory import Group, Prompt, Trajectory

Perturbation = Callable[[str, Prompt, np.random.Generator], str | None]
NUMBERING = re.compile(r"\s*\(?\d+[.):]\s+")


@dataclass(frozen=True)
class Shuffled:
    """The events of a question in another order; what stands before and behind them stays.

    The events are `meta["events"]` of the prompt (texts, in the order in which they occur), else the pieces of the
    question between `separator`s, without the first `head` and the last `tail` pieces (the question itself, choices).
    Numbers in front of events ("1. ") stay at their places: they would give the order away. The order that is drawn is
    never the true one.

    None, for a prompt without two different events.
    """

    separator: str = "\n"
    head: int = 0
    tail: int = 1

    def __call__(self, question: str, prompt: Prompt, chance: np.random.Generator) -> str | None:
        listed = prompt.meta.get("events")
        if listed is not None:
            return self._replaced(question, [str(e) for e in listed], chance)
        ending = question[len(question.rstrip()) :]
        pieces = question.rstrip().split(self.separator)
        stop = len(pieces) - self.tail
        events = pieces[self.head : stop]
        shuffled = reordered(events, chance)
        if shuffled is None:
            return None
        return self.separator.join([*pieces[: self.head], *shuffled, *pieces[stop:]]) + ending

    @staticmethod
    def _replaced(question: str, events: list[str], chance: np.random.Generator) -> str | None:
        """The listed events exchanged at the places where they stand."""
        shuffled = reordered(events, chance)
        if shuffled is None:
            return None
        text, rest = "", question
        for event, other in zip(events, shuffled, strict=True):
            before, found, rest = rest.partition(event)
            if not found:
                return None  # the question does not hold its events in their order
            text += before + other
        return text + rest


def reordered(events: Sequence[str], chance: np.random.Generator) -> list[str] | None:
    """The events in a random order that reads differently; None where there is none. Numbering stays in its place."""
    marks = [NUMBERING.match(event) for event in events]
    numbers = [m.group() if m is not None and all(marks) else "" for m in marks]
    bare = [event[len(number) :] for event, number in zip(events, numbers, strict=True)]
    if len(set(bare)) < 2:
        return None
    while True:
        order = chance.permutation(len(bare))
        found = [bare[i] for i in order]
        if found != bare:
            return [number + event for number, event in zip(numbers, found, strict=True)]


@dataclass(frozen=True)
class Twin:
    """A group for each prompt as usual, and a scored but untrained one on its perturbed question.

    perturb: makes the other question, or None where a prompt has nothing to perturb (it then gets no twin).
    samples: completions of a twin; None: as many as a group has. right: which completions are.

    Leaves the facts `right` (0 or 1) and, where there is a twin, `twin_accuracy` on every trajectory of the group, and
    the metrics `twin_accuracy` and `twin_gap` (how much more often the policy is right on the true question).
    """

    perturb: Perturbation = field(default_factory=Shuffled)
    samples: int | None = None
    right: Right = field(default_factory=Right)

    def __call__(self, prompts: Sequence[Prompt], context: StepContext) -> list[Group]:
        groups = context.draw(prompts)
        chance = context.random("twin")
        twins = [self._twin(p, context, chance) for p in prompts]
        drawn = iter(context.draw([t for t in twins if t is not None], self.samples))
        gaps, accuracies = [], []
        for group, twin in zip(groups, twins, strict=True):
            accuracy = self._accuracy(group.trajectories)
            for trajectory in group.trajectories:
                trajectory.facts["right"] = float(self.right(trajectory))
            if twin is not None:
                other = self._accuracy(next(drawn).trajectories)
                accuracies.append(other)
                gaps.append(accuracy - other)
                for trajectory in group.trajectories:
                    trajectory.facts["twin_accuracy"] = other
        if gaps:
            context.metrics["twin_accuracy"] = sum(accuracies) / len(accuracies)
            context.metrics["twin_gap"] = sum(gaps) / len(gaps)
        return groups

    def _accuracy(self, trajectories: Sequence[Trajectory]) -> float:
        return sum(self.right(t) for t in trajectories) / len(trajectories)

    def _twin(self, prompt: Prompt, context: StepContext, chance: np.random.Generator) -> Prompt | None:
        """The prompt with its last user turn (or its plain text) perturbed, and all else as it was."""
        other = self.perturb(prompt.question, prompt, chance)
        if other is None:
            return None
        tokenizer = context.required_policy().tokenizer
        if not prompt.messages:
            rendered = render_prompt(tokenizer, other, chat=False)
        else:
            last = max(i for i, m in enumerate(prompt.messages) if m.get("role") == "user")
            turns = [*prompt.messages[:last], {**prompt.messages[last], "content": other}, *prompt.messages[last + 1 :]]
            rendered = render_prompt(tokenizer, turns)
        return replace(prompt, tokens=rendered.tokens, messages=rendered.messages, text=rendered.text)
