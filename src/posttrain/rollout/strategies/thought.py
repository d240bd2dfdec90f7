r"""Thinking before a token of a document, rewarded by how much likelier the thought makes it (RLP).

.. math:: r(c) = \log p_\theta(x_t \mid x_{<t}, c) - \log \bar p_\phi(x_t \mid x_{<t})

with φ the stage's reference, which follows the policy as a moving average. Both are constants: no gradient goes through
the reward. Documents are the prompts' demonstrations: the prompt and its worked solution, as one text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from posttrain.models.causal import CausalPolicy
from posttrain.models.scoring import action_statistics
from posttrain.rollout.context import StepContext
from posttrain.rollout.strategy import demonstration_of
from posttrain.trajectory import Group, PosttrainError, Prompt, Trajectory

Place = tuple[Prompt, Tensor, int]  # the prompt of the thought, the document `[length]` and the place of its next token


@dataclass(frozen=True)
class ThinkBeforeNext:
    """A group of thoughts before one token of each document.

    open, close: text that begins and ends a thought; one cut off at the length limit is closed before it is judged.
    within: places anywhere in the `document`, or only in the `solution` that the prompt asks for; never its end token.
    least: tokens of the document before the place, at least.

    Leaves the reward component `gain` (nats) and the metric `gain`.
    """

    open: str = "<think>"
    close: str = "</think>"
    within: Literal["document", "solution"] = "document"
    least: int = 1
    demonstrations: ClassVar[bool] = True
    reference: ClassVar[bool] = True

    def __call__(self, prompts: Sequence[Prompt], context: StepContext) -> list[Group]:
        policy = context.required_policy()
        places = [self._place(prompt, policy, context) for prompt in prompts]
        sampling = replace(context.sampling, stop=(self.close,))
        groups = context.sample([p for p, _, _ in places], sampling=sampling)
        gains = self.gains(groups, places, context)
        for group, prompt, gain in zip(groups, prompts, gains, strict=True):
            group.prompt = prompt
            for trajectory, value in zip(group.trajectories, gain.tolist(), strict=True):
                trajectory.reward, trajectory.rewards = value, {"gain": value}
        context.metrics["gain"] = float(torch.cat(gains).mean())
        return groups

    def gains(self, groups: Sequence[Group], places: Sequence[Place], context: StepContext) -> list[Tensor]:
        """Information gain of each thought of each group, `[members]` fp32, nats."""
        policy = context.required_policy()
        if context.reference is None:
            raise RuntimeError("the gain is relative to the stage's reference policy; it runs inside the training loop")
        thought = [
            _next(closed(trajectory, self.close, policy), document[place])
            for group, (_, document, place) in zip(groups, places, strict=True)
            for trajectory in group.trajectories
        ]
        plain = [_next(document[:place], document[place]) for _, document, place in places]
        with_thought = torch.cat(action_statistics(policy, thought, context.token_budget))
        with context.reference() as reference:
            without = torch.cat(action_statistics(reference, plain, context.token_budget))
        sizes = [len(group) for group in groups]
        return [own - base for own, base in zip(with_thought.split(sizes), without, strict=True)]

    def _place(self, prompt: Prompt, policy: CausalPolicy, context: StepContext) -> Place:
        document = demonstration_of(prompt)
        first = max(self.least, 1, document.prompt_length if self.within == "solution" else 1)
        last = document.length - int(int(document.tokens[-1]) in policy.end_tokens)
        if first >= last:
            raise PosttrainError(
                f"the document {prompt.question[:60]!r} has {last} tokens; no place in it has {first} before"
            )
        place = int(context.random(f"place {prompt.key}").integers(first, last))
        asked = torch.cat([document.tokens[:place], encoded(self.open, policy)])
        return replace(prompt, tokens=asked), document.tokens, place


def encoded(text: str, policy: CausalPolicy) -> Tensor:
    """A marker's tokens, `[length]` int64."""
    return torch.tensor(policy.tokenizer.encode(text, add_special_tokens=False), dtype=torch.int64)


def closed(trajectory: Trajectory, close: str, policy: CausalPolicy) -> Tensor:
    """Prompt and thought, `[length]` int64, ended by the closing marker whether or not the policy wrote it."""
    tokens = trajectory.tokens
    if trajectory.text.endswith(close):
        return tokens
    if int(tokens[-1]) in policy.end_tokens:
        tokens = tokens[:-1]
    return torch.cat([tokens, encoded(close, policy)])


def _next(before: Tensor, token: Tensor) -> Trajectory:
    """A sequence of which only the last token is asked for."""
    tokens = torch.cat([before, token[None]])
    return Trajectory(tokens, torch.arange(len(tokens)) == len(tokens) - 1)
