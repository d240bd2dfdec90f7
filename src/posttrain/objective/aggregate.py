"""Aggregation: the 1/Z of the objective, a weight a token, always counted over the whole optimizer step.

Micro-batches, gradient accumulation and several processes therefore cannot change what a token weighs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from posttrain.objective.batch import Batch, Totals


class Aggregate(Protocol):
    def __call__(self, batch: Batch, totals: Totals) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class TokenMean:
    """Every token of the step weighs the same: 1 / tokens."""

    def __call__(self, batch: Batch, totals: Totals) -> Tensor:
        return torch.full((batch.target.numel(),), 1 / totals.tokens)


@dataclass(frozen=True, slots=True)
class SequenceMean:
    """Mean over a sequence's tokens, then over sequences: 1 / (sequences * length). Long answers weigh less a token."""

    def __call__(self, batch: Batch, totals: Totals) -> Tensor:
        return batch.spread(1 / (totals.sequences * batch.lengths))


@dataclass(frozen=True, slots=True)
class SequenceSum:
    """Sum over a sequence's tokens, mean over sequences: 1 / sequences."""

    def __call__(self, batch: Batch, totals: Totals) -> Tensor:
        return torch.full((batch.target.numel(),), 1 / totals.sequences)


@dataclass(frozen=True, slots=True)
class ConstantLength:
    """Sum over tokens divided by a constant length, mean over sequences (Dr. GRPO): 1 / (sequences * length)."""

    length: int

    def __call__(self, batch: Batch, totals: Totals) -> Tensor:
        return torch.full((batch.target.numel(),), 1 / (totals.sequences * self.length))


@dataclass(frozen=True, slots=True)
class GroupMean:
    """Sum over everything in a group (a preference pair), mean over groups: 1 / groups."""

    def __call__(self, batch: Batch, totals: Totals) -> Tensor:
        return torch.full((batch.target.numel(),), 1 / totals.groups)


@dataclass(frozen=True, slots=True)
class PromptMean:
    """Mean over a sequence's tokens, sum over sequences, divided by the prompts of the whole step, also those that have
    no sequence in this term of a mixture: 1 / (prompts * length)."""

    def __call__(self, batch: Batch, totals: Totals) -> Tensor:
        return batch.spread(1 / (totals.step_groups * batch.lengths))
