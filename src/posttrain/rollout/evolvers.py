"""Evolvers: new prompts made of old ones, by a rule or by a language model that rewrites them.

Reference: the operations are those of WizardLM's Evol-Instruct, 2023, arXiv 2304.12244.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from posttrain.data.templates import render_prompt
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.context import StepContext
from posttrain.rollout.engine_choice import engine_for
from posttrain.trajectory import Prompt, Sampling, Trajectory


class Evolver(Protocol):
    """A new prompt for each of `prompts` (one may occur several times), or None where nothing came of it."""

    def __call__(self, prompts: Sequence[Prompt], context: StepContext) -> list[Prompt | None]: ...


@dataclass(frozen=True)
class Variation:
    """What a rule makes of a prompt: its words, the reference answer, and `meta` (None: as of the old one)."""

    text: str
    answer: Any = None
    meta: dict[str, Any] | None = None


Rule = Callable[[Prompt, np.random.Generator], Variation | None]


@dataclass(frozen=True)
class RuleEvolver:
    """New prompts by a rule, which knows their answers.

    The rule sees no held-out problem: it must itself avoid making one.
    """

    rule: Rule

    def __call__(self, prompts: Sequence[Prompt], context: StepContext) -> list[Prompt | None]:
        chance, policy = context.random("evolve by rule"), context.required_policy()
        made = [self.rule(prompt, chance) for prompt in prompts]
        return [None if v is None else in_place_of(p, v, policy) for p, v in zip(prompts, made, strict=True)]


DEEPER = (
    "Add one more requirement or constraint to it.",
    "Make it go deeper: widen what is asked for without changing its subject.",
    "Replace its general notions by more specific ones.",
    "Rework it so that answering takes several steps of reasoning.",
    "Add input that has to be read to answer: a table, a formula, a piece of code or data.",
)
BROADER = "Write a quite different task of the same field instead, about as long and as hard, on something less usual."
REQUEST = (
    "Here is a task for an assistant:\n\n{prompt}\n\nRewrite it into a new task. {operation} A person must be able to "
    "understand and answer it. Keep it short. Write the new task alone, without any comment and without an answer."
)
REFUSAL = re.compile(r"\b(?:sorry|i cannot|i can't|i can not|i am unable|i'm unable|as an ai)\b", re.IGNORECASE)


@dataclass(frozen=True)
class InstructionEvolver:
    """New prompts written by the method's teacher, or by the policy itself where there is none.

    They have no reference answer, so the reward must be one that needs none (a reward model, a judge, a format).
    What is empty, cut off, unchanged, overlong or reads like a refusal is dropped.

    Args:
        operations: in words, one is drawn for each prompt. request: holds `{prompt}` and `{operation}`.
        longest: characters of a new prompt at most.
    """

    operations: tuple[str, ...] = field(default=(*DEEPER, BROADER), repr=False)
    request: str = field(default=REQUEST, repr=False)
    sampling: Sampling = field(default_factory=lambda: Sampling(max_tokens=256, temperature=0.7))
    longest: int = 2000

    def __call__(self, prompts: Sequence[Prompt], context: StepContext) -> list[Prompt | None]:
        policy = context.required_policy()
        writer = context.teacher or policy
        operations = context.random("evolve by instruction").choice(len(self.operations), size=len(prompts))
        asked = []
        for prompt, number in zip(prompts, operations, strict=True):
            words = self.request.replace("{operation}", self.operations[int(number)])
            words = words.replace("{prompt}", prompt.question)
            asked.append(replace(render_prompt(writer.tokenizer, words), key=prompt.key))
        engine = engine_for(writer) if writer is not policy else None
        written = context.sample(asked, 1, sampling=self.sampling, engine=engine)
        return [self._read(p, group.trajectories[0], policy) for p, group in zip(prompts, written, strict=True)]

    def _read(self, prompt: Prompt, completion: Trajectory, policy: CausalPolicy) -> Prompt | None:
        text = completion.text.strip()
        fine = completion.finish == "stop" and 0 < len(text) <= self.longest and text != prompt.question.strip()
        return in_place_of(prompt, Variation(text), policy) if fine and not REFUSAL.search(text) else None


def in_place_of(old: Prompt, new: Variation, policy: CausalPolicy) -> Prompt:
    """The old prompt with other words: of its last user turn where it is a conversation, else of the plain text."""
    users = [i for i, message in enumerate(old.messages) if message.get("role") == "user"]
    if users:
        messages = [*old.messages[: users[-1]], {"role": "user", "content": new.text}]
        made = render_prompt(policy.tokenizer, messages)
    else:  # plain text: the completion starts on a line of its own, as after the problems of a task
        made = render_prompt(policy.tokenizer, new.text if new.text.endswith("\n") else f"{new.text}\n", chat=False)
    made.key = int.from_bytes(hashlib.blake2b(new.text.encode(), digest_size=6).digest(), "big")
    made.answer, made.meta = new.answer, dict(old.meta if new.meta is None else new.meta)
    return made
