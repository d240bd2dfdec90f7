"""A tiny softmax policy in float64 and one batch seen twice: flat, as the objective computes with it, and padded to
`[sequences, longest]`, as papers write their losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from posttrain.objective.batch import Batch
from posttrain.objective.likelihood import Likelihood
from posttrain.objective.logprob import Head, token_statistics
from posttrain.trajectory import Group, Label, Trajectory

VOCABULARY, WIDTH, LONGEST = 9, 5, 16
Kind = Literal["demonstrations", "preferences", "feedback", "prompts"]


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """The whole chain in float64; a module takes it by importing it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


class TablePolicy:
    """State of a token: a table row of the token before it plus one of its place; logits by a linear head."""

    def __init__(self, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        sizes = {"token": (VOCABULARY, WIDTH), "place": (LONGEST, WIDTH), "head": (VOCABULARY, WIDTH),
                 "bias": (VOCABULARY,), "critic": (WIDTH,)}  # fmt: skip
        self.parameters = {
            name: torch.randn(*size, generator=draw, dtype=torch.float64).requires_grad_()
            for name, size in sizes.items()
        }

    def hidden(self, before: Tensor, place: Tensor) -> Tensor:
        return torch.tanh(self.parameters["token"][before] + self.parameters["place"][place])

    def log_likelihood(self, batch: Batch) -> Likelihood:
        """By the fused operator, in chunks of three tokens."""
        before = torch.stack([batch.tokens[s][p - 1] for s, p in zip(batch.sequence, batch.place, strict=True)])
        hidden = self.hidden(before, batch.place)
        head = Head(self.parameters["head"], self.parameters["bias"])
        found = token_statistics(hidden, batch.target, head, entropy=True, chunk_elements=3 * VOCABULARY)
        return Likelihood(
            found.logp, found.entropy, hidden=hidden, head=head, value=hidden.detach() @ self.parameters["critic"]
        )

    def padded(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """`[S, T]` log-probabilities of every token given the one before, and critic values; column 0 is never used."""
        before = torch.cat([tokens[:, :1], tokens[:, :-1]], 1)
        hidden = self.hidden(before, torch.arange(tokens.shape[1]).expand_as(tokens))
        logits = hidden @ self.parameters["head"].T + self.parameters["bias"]
        logp = logits.log_softmax(-1).gather(2, tokens[..., None])[..., 0]
        return logp, hidden.detach() @ self.parameters["critic"]


@dataclass
class Padded:
    """What a paper's loss is written with. `[S, T]`: logp, value (differentiable), mask, old, reference, old_value.
    `[S]`: reward, truncated, label. groups: the rows of each group. rewards: `[S]` by component.
    """

    logp: Tensor
    value: Tensor
    mask: Tensor
    old: Tensor
    reference: Tensor
    old_value: Tensor
    reward: Tensor
    rewards: dict[str, Tensor]
    truncated: Tensor
    label: Tensor
    groups: list[list[int]]
    mismatched_kl: float

    @property
    def lengths(self) -> Tensor:
        return self.mask.sum(1)

    def sum(self, values: Tensor) -> Tensor:
        return (values * self.mask).sum(1)

    def mean(self, values: Tensor) -> Tensor:
        return self.sum(values) / self.lengths

    def pairs(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Values `[S]` of the chosen and of the rejected sequence of each group, `[G]` each."""
        sides = [[next(s for s in g if self.label[s] == sign) for g in self.groups] for sign in (1, -1)]
        return values[sides[0]], values[sides[1]]


class World:
    """One batch of a kind of data, with every signal random, and the policy that is updated. length: of every
    completion in action tokens; random ones by default.
    """

    def __init__(self, kind: Kind, seed: int = 0, length: int | None = None) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.policy = TablePolicy(seed)
        groups = list(_groups(kind, draw, length))
        batch = Batch.of(groups)
        for f in fields(batch):  # the whole chain in float64
            value = getattr(batch, f.name)
            if isinstance(value, Tensor) and value.dtype == torch.float32:
                setattr(batch, f.name, value.double())
        batch.rewards = {name: value.double() for name, value in batch.rewards.items()}
        count = batch.target.numel()
        now = self.policy.log_likelihood(batch).logp.detach()
        # far enough from the policy for every clip, low and high, to bite
        batch.old_logp = now + 0.4 * torch.randn(count, generator=draw, dtype=torch.float64)
        batch.reference_logp = now + 0.4 * torch.randn(count, generator=draw, dtype=torch.float64)
        batch.value = torch.randn(count, generator=draw, dtype=torch.float64)
        batch.extras["mismatched_kl"] = torch.full((count,), 0.3, dtype=torch.float64)
        self.batch = batch

    def fresh(self) -> Batch:
        """The batch as it is before `prepare`."""
        return replace(self.batch)

    def padded(self) -> Padded:
        batch = self.batch
        tokens = torch.zeros(len(batch), max(len(t) for t in batch.tokens), dtype=torch.int64)
        for s, own in enumerate(batch.tokens):
            tokens[s, : len(own)] = own
        logp, value = self.policy.padded(tokens)

        def pad(flat: Tensor | None) -> Tensor:
            assert flat is not None
            out = torch.zeros(tokens.shape, dtype=flat.dtype)
            out[batch.sequence, batch.place] = flat
            return out

        numbers = sorted(set(batch.group.tolist()))
        return Padded(
            logp=logp,
            value=value,
            mask=pad(torch.ones(batch.target.numel(), dtype=torch.float64)),
            old=pad(batch.old_logp),
            reference=pad(batch.reference_logp),
            old_value=pad(batch.value),
            reward=batch.reward,
            rewards=batch.rewards,
            truncated=batch.truncated,
            label=batch.label,
            groups=[(batch.group == g).nonzero()[:, 0].tolist() for g in numbers],
            mismatched_kl=0.3,
        )


# several groups of unequal size, the second without variance
REWARDS: Sequence[Sequence[float]] = ((1.0, 0.0, 0.0, 0.25), (0.5, 0.5, 0.5), (0.0, 2.0), (1.0, 0.75, 0.0))


def _groups(kind: Kind, draw: torch.Generator, length: int | None) -> list[Group]:
    def tokens(prompt: Tensor, **parts: object) -> Trajectory:
        actions = length or int(torch.randint(1, 8, (), generator=draw))
        own = torch.cat([prompt, torch.randint(0, VOCABULARY, (actions,), generator=draw)])
        return Trajectory(own, torch.arange(len(own)) >= len(prompt), **parts)  # type: ignore[arg-type]

    def prompt() -> Tensor:
        return torch.randint(0, VOCABULARY, (int(torch.randint(1, 5, (), generator=draw)),), generator=draw)

    if kind == "demonstrations":
        return [Group([tokens(prompt(), source="expert")]) for _ in range(6)]
    labels: tuple[Label, Label] = ("chosen", "rejected")
    if kind == "feedback":
        return [Group([tokens(prompt(), label=labels[i % 3 == 2])]) for i in range(6)]
    if kind == "preferences":
        made = []
        for i in range(5):
            shared = prompt()
            order = labels if i % 2 else labels[::-1]
            made.append(Group([tokens(shared, label=label) for label in order]))
        return made
    made = []
    for rewards in REWARDS:
        shared = prompt()
        members = []
        for i, reward in enumerate(rewards):
            parts = {"right": reward, "short": float(torch.rand((), generator=draw).round(decimals=2))}
            finish = "length" if i == 1 else "stop"
            members.append(tokens(shared, reward=reward, rewards=parts, finish=finish))
        made.append(Group(members))
    return made
