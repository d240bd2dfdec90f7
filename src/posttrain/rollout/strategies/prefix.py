r"""Continuing demonstrations: one completion of each group starts with the first tokens of the prompt's own.

.. math:: o_N = [\,y^*_{<L},\ \text{continuation} \sim \pi(\cdot \mid x, y^*_{<L})\,],\qquad
          L = \lfloor \ell\,|y^*| \rfloor,\quad \ell \sim U(\mathrm{low}(s), \mathrm{high})

The prefix is an action like the continuation: its tokens are trained on, and say by `token_source` who wrote them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from posttrain.models.causal import CausalPolicy
from posttrain.objective.schedule import Coefficient, Cosine, at
from posttrain.rollout.context import StepContext
from posttrain.rollout.strategy import demonstration_of, one_turn
from posttrain.trajectory import SOURCES, Group, PosttrainError, Prompt, Trajectory

SHRINKING = Cosine(0.95, 0.05)


@dataclass(frozen=True)
class DemonstrationPrefix:
    """A group is its plain completions and one that continues a piece of the demonstration (Prefix-RFT, card 035).

    low, high: the share of the demonstration that is given is drawn between them; `low` may follow a schedule.
    room: tokens of `max_tokens` that stay for the continuation, however long the demonstration is.

    The demonstration's end token is never given, nor counted. Prefix and continuation together have `max_tokens`.
    """

    low: Coefficient = SHRINKING
    high: float = 0.95
    room: int = 1
    demonstrations: ClassVar[bool] = True

    def __call__(self, prompts: Sequence[Prompt], context: StepContext) -> list[Group]:
        one_turn(context, "a demonstration is continued")
        policy, limit = context.required_policy(), context.sampling.max_tokens
        if not 1 <= self.room <= limit:
            raise PosttrainError(f"room is {self.room}; expected 1 to max_tokens ({limit}) tokens for the continuation")
        low = at(self.low, context)
        shares = context.random("prefix").uniform(min(low, self.high), self.high, len(prompts))
        given = [self._prefix(p, policy, limit, float(s)) for p, s in zip(prompts, shares, strict=True)]
        begun = [replace(p, tokens=torch.cat([p.tokens, y])) for p, y in zip(prompts, given, strict=True)]
        plain = context.sample(prompts, context.group - 1) if context.group > 1 else [Group([]) for _ in prompts]
        longest = replace(context.sampling, max_tokens=limit - min(len(y) for y in given))
        continued = context.sample(begun, 1, sampling=longest)
        groups = [
            Group([*p.trajectories, _joined(c.trajectories[0], prompt, y, limit, policy)], prompt)
            for p, c, prompt, y in zip(plain, continued, prompts, given, strict=True)
        ]
        context.score(groups)
        hybrid = [g.trajectories[-1].reward for g in groups]
        own = [t.reward for g in groups for t in g.trajectories[:-1]]
        context.metrics["prefix_tokens"] = sum(map(len, given)) / len(given)
        context.metrics["reward_with_prefix"] = sum(hybrid) / len(hybrid)
        if own:
            context.metrics["reward_without_prefix"] = sum(own) / len(own)
        return groups

    def _prefix(self, prompt: Prompt, policy: CausalPolicy, limit: int, share: float) -> Tensor:
        """The demonstration's first tokens, `[L]` int64."""
        whole = worked_tokens(prompt, policy.end_tokens)
        free = min(limit, policy.max_length - len(prompt.tokens)) - self.room
        return whole[: max(0, min(int(share * len(whole) + 1e-9), free))]


def worked_tokens(prompt: Prompt, ends: set[int]) -> Tensor:
    """Tokens of the prompt's demonstration without its end token, `[length]` int64."""
    demonstration = demonstration_of(prompt)
    places = demonstration.action_mask.nonzero()[:, 0]
    if len(places) and int(places[-1] - places[0]) + 1 != len(places):
        raise PosttrainError(
            f"the demonstration of prompt {prompt.question[:60]!r} has several turns; expected one to continue"
        )
    tokens = demonstration.tokens[places]
    while len(tokens) and int(tokens[-1]) in ends:
        tokens = tokens[:-1]
    return tokens


def _joined(sampled: Trajectory, prompt: Prompt, prefix: Tensor, limit: int, policy: CausalPolicy) -> Trajectory:
    """The prefix and its continuation as one completion of at most `limit` tokens."""
    start = len(prompt.tokens)
    own = slice(start, start + len(prefix))
    size = min(len(sampled.tokens), start + limit)
    cut = size < len(sampled.tokens)  # the call's limit was that of the shortest prefix
    source = torch.full((size,), SOURCES.index("policy"))
    source[own] = SOURCES.index("expert")
    mask = torch.arange(size) >= start
    logp, full = (_known(values, size, own) for values in (sampled.behaviour_logp, sampled.behaviour_logp_full))
    tokens = sampled.tokens[:size].clone()
    return Trajectory(
        tokens,
        mask,
        logp,
        full,
        torch.zeros(size, dtype=torch.int64),
        finish="length" if cut else sampled.finish,
        text=str(policy.tokenizer.decode(tokens[start:].tolist(), skip_special_tokens=True)),
        token_source=source,
    )


def _known(values: Tensor | None, size: int, prefix: slice) -> Tensor | None:
    """The sampler's log-probabilities; unknown (NaN) where it did not choose the token."""
    if values is None:
        return None
    values = values[:size].clone()
    values[prefix] = float("nan")
    return values
