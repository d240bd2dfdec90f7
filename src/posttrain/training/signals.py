"""Signals: what an objective asks for beside the batch (old, reference and mismatched log-probabilities, values).

They are computed over the whole step before its first update, without gradient, in the same packed micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.objective.divergence import Need
from posttrain.objective.likelihood import Likelihood
from posttrain.training.critic import ValueHead
from posttrain.trajectory import Group, PosttrainError, Trajectory


class Reference:
    """The frozen policy of a stage's start: a copy, or for adapters the same model with them switched off."""

    def __init__(self, policy: CausalPolicy) -> None:
        self.policy = policy
        self.copy = None if policy.adapted else policy.frozen_copy()

    @contextmanager
    def active(self) -> Iterator[CausalPolicy]:
        if self.copy is not None:
            with torch.no_grad():
                yield self.copy
        else:
            with self.policy.without_adapter() as policy:
                yield policy


def per_token(batch: Batch, budget: int, compute: Callable[[Batch], Tensor]) -> Tensor:
    """Compute a `[M]` array of the whole batch in micro-batches, without gradient, on the CPU."""
    result = torch.empty(batch.target.numel())
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), batch.lengths.cumsum(0)])
    for sequences in batch.partition(budget, keep_groups=False):
        index = torch.cat([torch.arange(int(starts[s]), int(starts[s + 1])) for s in sequences.tolist()])
        with torch.no_grad():
            result[index] = compute(batch.select(sequences)).float().cpu()
    return result


def supply(
    needs: frozenset[Need],
    batch: Batch,
    groups: Sequence[Group],
    policy: CausalPolicy,
    reference: Reference | None,
    critic: ValueHead | None,
    *,
    temperature: float,
    budget: int,
) -> None:
    """Add every per-token signal that is asked for to the batch."""

    def logp(of: CausalPolicy) -> Callable[[Batch], Tensor]:
        return lambda part: of.log_likelihood(part, temperature=temperature).logp

    if "old_logp" in needs:
        batch.old_logp = per_token(batch, budget, logp(policy))
    if "value" in needs:
        assert critic is not None

        def values(part: Batch) -> Tensor:
            hidden = policy.log_likelihood(part).hidden
            assert hidden is not None
            return critic(hidden)

        batch.value = per_token(batch, budget, values)
    if "reference_logp" in needs or "mismatched_kl" in needs:
        assert reference is not None
        with reference.active() as frozen:
            batch.reference_logp = per_token(batch, budget, logp(frozen))
    if "mismatched_kl" in needs:
        assert reference is not None
        other = mismatched(groups, policy.max_length)
        theirs = per_token(other, budget, logp(policy))
        with reference.active() as frozen:
            base = per_token(other, budget, logp(frozen))
        batch.extras["mismatched_kl"] = other.sum(theirs - base).mean().expand(batch.target.numel()).clone()


def mismatched(groups: Sequence[Group], limit: int) -> Batch:
    """Each row's prompt with the next row's answer: what the policy thinks of answers that do not belong.

    Answers are cut where the two together exceed `limit` tokens, the model's context.
    """
    rows = [t for group in groups for t in group.trajectories]
    if len(rows) < 2:
        raise PosttrainError("KTO needs at least 2 rows a step to pair prompts with other answers; raise batch")
    shuffled = []
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        prompt, answer = row.tokens[: row.prompt_length], other.tokens[other.prompt_length :]
        tokens = torch.cat([prompt, answer])
        mask = torch.cat([torch.zeros(len(prompt), dtype=torch.bool), other.action_mask[other.prompt_length :]])
        shuffled.append(Group([Trajectory(tokens[:limit], mask[:limit])]))
    return Batch.of(shuffled)


def full_reference(reference: Reference, batch: Batch, temperature: float) -> Likelihood:
    """The reference's hidden states and head for a micro-batch (full-vocabulary divergences)."""
    with reference.active() as frozen:
        return frozen.log_likelihood(batch, temperature=temperature)
