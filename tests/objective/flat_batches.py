"""Small ragged batches for the tests of the objective, and a policy of one shared table of logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.objective.batch import Batch
from posttrain.objective.likelihood import Likelihood
from posttrain.trajectory import Group, Label, Trajectory

VOCABULARY = 6


def sequence(actions: int, prompt: int = 2, seed: int = 0, **fields: object) -> Trajectory:
    """`prompt` tokens that depend on the seed alone, then `actions` tokens the policy chose."""
    shared = torch.randint(0, VOCABULARY, (prompt,), generator=torch.Generator().manual_seed(seed))
    draw = torch.Generator().manual_seed(1000 * seed + actions)
    tokens = torch.cat([shared, torch.randint(0, VOCABULARY, (actions,), generator=draw)])
    return Trajectory(tokens, torch.arange(prompt + actions) >= prompt, **fields)  # type: ignore[arg-type]


def ragged(groups: Sequence[Sequence[int]], rewards: Sequence[Sequence[float]] | None = None) -> Batch:
    """A batch of groups, each given by the numbers of action tokens of its members."""
    made = []
    for g, lengths in enumerate(groups):
        given = rewards[g] if rewards is not None else [0.0] * len(lengths)
        made.append(Group([sequence(n, seed=g, reward=r) for n, r in zip(lengths, given, strict=True)]))
    return Batch.of(made)


def pairs(lengths: Sequence[tuple[int, int]], flip: Sequence[int] = ()) -> Batch:
    """Preference pairs by the numbers of tokens of chosen and rejected; those in `flip` stand rejected first."""
    made = []
    for g, (chosen, rejected) in enumerate(lengths):
        labels: list[tuple[int, Label]] = [(chosen, "chosen"), (rejected, "rejected")]
        if g in flip:
            labels.reverse()
        made.append(Group([sequence(n, seed=g, label=label) for n, label in labels]))
    return Batch.of(made)


def table_likelihood(batch: Batch, logits: Tensor) -> Likelihood:
    """Every token drawn from one distribution `softmax(logits)`, `[VOCABULARY]`."""
    logp = torch.log_softmax(logits, -1)
    entropy = -(logp.exp() * logp).sum().expand(batch.target.numel())
    return Likelihood(logp[batch.target], entropy=entropy)
