r"""Feedback in the rollout: a teacher reads some of the attempts and writes on, and both together are the completion.

.. math:: \tilde o_i = [\,o_i \oplus f_i\,],\qquad f_i \sim \text{teacher}(\cdot \mid x, o_i)

Attempt and feedback are joined as tokens and never tokenised again; `token_source` says who wrote which.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from posttrain.data.templates import render_prompt
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.context import StepContext
from posttrain.rollout.engine_choice import engine_for
from posttrain.rollout.strategy import one_turn
from posttrain.trajectory import SOURCES, Group, PosttrainError, Prompt, Trajectory

PLACES = ("question", "attempt", "verdict", "answer")
SENTENCE = re.compile(r"[.!?](?=\s|$)|\n")
FEEDBACK = """\
Question:
{question}

A first attempt at it:
{attempt}

The attempt is {verdict}. Go on writing behind it, as its author, in the first person: say what you think of the \
attempt, give the reason, and then think again, beginning with words like "Wait, let me check". End with the final \
answer, marked as the question asks for."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What a teacher is shown. text: without its end token. right: whether the task's reward says so.

    tokens: `[length]` int64, prompt and attempt.
    """

    prompt: Prompt
    text: str
    right: bool
    tokens: Tensor


class Author(Protocol):
    """Writes feedback: tokens of the policy's vocabulary for each attempt, with the end token where it is finished.

    reference: (class attribute or field) True where it asks the stage's reference policy.
    """

    def __call__(self, attempts: Sequence[Attempt], context: StepContext) -> list[Tensor]: ...


@dataclass(frozen=True)
class Prompted:
    """A language model as the author: the method's teacher, or, with `reference`, the stage's first policy.

    template: what it is asked, a user turn (plain text without a chat template). {question}, {attempt}, {verdict}
        ("right" or "wrong", by the task's reward) and {answer} (the reference answer, which the policy may then learn
        to wait for) are filled in; a template may hold worked examples. joint: text between attempt and feedback.
    max_tokens: of a feedback; None takes the stage's.
    """

    template: str = FEEDBACK
    joint: str = "\n\n"
    max_tokens: int | None = None
    reference: bool = False

    def __post_init__(self) -> None:
        if "{attempt}" not in self.template:
            raise PosttrainError("the feedback template has no {attempt}; the teacher must see what it judges")

    def __call__(self, attempts: Sequence[Attempt], context: StepContext) -> list[Tensor]:
        sampling = context.sampling
        if self.max_tokens is not None:
            sampling = replace(sampling, max_tokens=self.max_tokens)
        tokenizer = context.required_policy().tokenizer
        joint = torch.tensor(tokenizer.encode(self.joint, add_special_tokens=False), dtype=torch.int64)
        asked = [replace(render_prompt(tokenizer, self.asked(attempt)), key=attempt.prompt.key) for attempt in attempts]
        with self._teacher(context) as teacher:
            written = engine_for(teacher).generate(asked, 1, sampling, context.derived_seed("feedback text"))
        return [torch.cat([joint, completions[0].tokens]) for completions in written]

    def asked(self, attempt: Attempt) -> str:
        """The template, filled in; what stands in an attempt is never taken for a place of the template."""
        values = {
            "question": attempt.prompt.question.strip(),
            "attempt": attempt.text.strip(),
            "verdict": "right" if attempt.right else "wrong",
            "answer": str(attempt.prompt.answer),
        }
        return re.sub("{(" + "|".join(PLACES) + ")}", lambda found: values[found[1]], self.template)

    @contextmanager
    def _teacher(self, context: StepContext) -> Iterator[CausalPolicy]:
        if not self.reference:
            yield context.required_teacher("feedback")
            return
        assert context.reference is not None
        with context.reference() as policy:
            yield policy


@dataclass(frozen=True)
class Feedback:
    """A group is its completions, of which a share, chosen at random, goes on with a teacher's feedback (ThinkTuning,
    2025, arXiv 2508.07616, card 085). The reward is that of the whole text, so a verifier must look at the last answer.

    share: of a group, rounded up. author: who writes. right: the reward from which an attempt counts as right.

    An attempt that was cut off loses its last, unfinished sentence first. Feedback is cut where the model's context
    ends.
    """

    share: float = 0.25
    author: Author = field(default_factory=Prompted)
    right: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise PosttrainError(f"share is {self.share}; expected a share of the completions between 0 and 1")

    @property
    def reference(self) -> bool:
        return bool(self.share) and getattr(self.author, "reference", False)

    def __call__(self, prompts: Sequence[Prompt], context: StepContext) -> list[Group]:
        one_turn(context, "feedback is written")
        groups = context.draw(prompts)
        count = math.ceil(self.share * context.group - 1e-9)
        if not count:
            return groups
        policy, chance = context.required_policy(), context.random("feedback")
        chosen = [(g, int(i)) for g in groups for i in chance.choice(len(g), min(count, len(g)), replace=False)]
        attempts = [self._attempt(g, g.trajectories[i], policy) for g, i in chosen]
        joined = []
        for (group, i), attempt, text in zip(chosen, attempts, self.author(attempts, context), strict=True):
            room = policy.max_length - len(attempt.tokens)
            if not len(text) or room < 1:
                continue
            group.trajectories[i] = _joined(group.trajectories[i], attempt, text[:room], policy)
            joined.append((attempt.right, Group([group.trajectories[i]], group.prompt)))
        context.score([group for _, group in joined])
        self._report(joined, context)
        return groups

    def _attempt(self, group: Group, trajectory: Trajectory, policy: CausalPolicy) -> Attempt:
        """The attempt as another may go on with it: without its end token, and without an unfinished sentence."""
        assert group.prompt is not None
        start = len(group.prompt.tokens)
        tokens = trajectory.tokens
        while len(tokens) > start and int(tokens[-1]) in policy.end_tokens:
            tokens = tokens[:-1]
        if trajectory.finish == "length":
            tokens = tokens[: start + _whole_sentences(tokens[start:], policy)]
        text = str(policy.tokenizer.decode(tokens[start:].tolist(), skip_special_tokens=True))
        return Attempt(group.prompt, text, trajectory.reward >= self.right - 1e-9, tokens)

    def _report(self, joined: Sequence[tuple[bool, Group]], context: StepContext) -> None:
        """Rescue rate: the share of wrong attempts that feedback made right; harm: of right ones that it made wrong."""
        after = [(before, group.trajectories[0].reward >= self.right - 1e-9) for before, group in joined]
        for name, kind in (("rescue_rate", False), ("harm_rate", True)):
            found = [now != kind for before, now in after if before == kind]
            if found:
                context.metrics[name] = sum(found) / len(found)


def _joined(sampled: Trajectory, attempt: Attempt, text: Tensor, policy: CausalPolicy) -> Trajectory:
    """Attempt and feedback as one completion."""
    kept, size = len(attempt.tokens), len(attempt.tokens) + len(text)
    start = len(attempt.prompt.tokens)
    tokens = torch.cat([attempt.tokens, text])
    source = torch.full((size,), SOURCES.index("policy"))
    source[kept:] = SOURCES.index("teacher")

    def known(values: Tensor | None) -> Tensor | None:
        return None if values is None else torch.cat([values[:kept], torch.full((len(text),), float("nan"))])

    return Trajectory(
        tokens,
        torch.arange(size) >= start,
        known(sampled.behaviour_logp),
        known(sampled.behaviour_logp_full),
        torch.zeros(size, dtype=torch.int64),
        finish="stop" if int(tokens[-1]) in policy.end_tokens else "length",
        text=str(policy.tokenizer.decode(tokens[start:].tolist(), skip_special_tokens=True)),
        token_source=source,
    )


def _whole_sentences(tokens: Tensor, policy: CausalPolicy) -> int:
    """How many tokens hold the whole sentences of a text that was cut off; all where no sentence ends in it."""
    ids = tokens.tolist()
    text = str(policy.tokenizer.decode(ids, skip_special_tokens=True))
    ends = [found.end() for found in SENTENCE.finditer(text)]
    if not ends or ends[-1] == len(text):
        return len(ids)
    low, high = 0, len(ids)  # the fewest tokens that reach the end of the last sentence
    while low < high:
        middle = (low + high) // 2
        if len(policy.tokenizer.decode(ids[:middle], skip_special_tokens=True)) >= ends[-1]:
            high = middle
        else:
            low = middle + 1
    return low
