r"""Importance ratios of prefixes: how far the state a token was written in is from those that the policy now visits.

With rollouts of an old policy the exact weight of token t's gradient is the product of the ratios up to t, since its
prefix was drawn from the old policy too. Its spread grows with length; the others here are tamer and biased. Their
relatives stand in denominator.py: the token's ratio alone (`ClippedWeight`, `OldPolicy`) and one ratio for a whole
sequence (`OldPolicySequence`). All is computed in log space, over a sequence's action tokens alone: what a tool says
between them has no ratio.
Reference: A step back: prefix importance ratio stabilizes policy optimization, 2026, arXiv 2601.22718 (card 178).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.objective.batch import Batch
from posttrain.objective.denominator import Ratio, old_logp


@dataclass(frozen=True)
class PrefixRatio:
    """Base: subclasses say in `log_weight` what a token weighs, from the token log-ratios of a batch.

    high: the weight's upper bound, as a constant weight (CISPO's form). None: no bound, and the ratio itself stands in
    the loss, to be clipped by a mask (PPO's form); the gradient goes through the token's own ratio alone.
    """

    high: float | None = 1.28

    def log_weight(self, batch: Batch, log_ratio: Tensor) -> Tensor:
        """`[M]` token log-ratios to `[M]` log-weights."""
        raise NotImplementedError

    def __call__(self, batch: Batch, logp: Tensor) -> Ratio:
        logp = logp.detach()
        log_weight = self.log_weight(batch, logp - old_logp(batch, logp))
        if self.high is None:
            return Ratio(log_weight.exp(), log_weight.exp(), log_weight)
        weight = log_weight.clamp(max=math.log(self.high)).exp()
        return Ratio(weight, weight * logp, log_weight)


@dataclass(frozen=True)
class PrefixProduct(PrefixRatio):
    r""":math:`\prod_{i\le t}\rho_i`: exact, with a spread that grows with length."""

    def log_weight(self, batch: Batch, log_ratio: Tensor) -> Tensor:
        table = by_sequence(batch, log_ratio, fill=0.0)
        return flat(batch, table.cumsum(1))


@dataclass(frozen=True)
class PrefixGeometricMean(PrefixRatio):
    r""":math:`(\prod_{i\le t}\rho_i)^{1/t}`."""

    def log_weight(self, batch: Batch, log_ratio: Tensor) -> Tensor:
        table = by_sequence(batch, log_ratio, fill=0.0)
        return flat(batch, table.cumsum(1) / torch.arange(1, table.shape[1] + 1, device=table.device))


@dataclass(frozen=True)
class PrefixMinimum(PrefixRatio):
    r"""The token's ratio times the smallest one before it (MinPRO): :math:`\rho_t\min_{i<t}\rho_i`, at first
    :math:`\rho_1`.

    cap_one: never let the smallest one weigh up (a minimum above 1 counts as 1). floor: the smallest it counts as, so
    that one outlier does not silence the rest of its sequence; 0 for none.
    """

    cap_one: bool = False
    floor: float = 0.0

    def log_weight(self, batch: Batch, log_ratio: Tensor) -> Tensor:
        table = by_sequence(batch, log_ratio, fill=math.inf)
        smallest = torch.zeros_like(table)
        smallest[:, 1:] = table.cummin(1).values[:, :-1]
        if self.cap_one:
            smallest = smallest.clamp(max=0.0)
        if self.floor:
            smallest = smallest.clamp(min=math.log(self.floor))
        return flat(batch, smallest) + log_ratio


def by_sequence(batch: Batch, values: Tensor, fill: float) -> Tensor:
    """A per-token array as a table, a row a sequence, its action tokens from the left: `[M]` to `[S, longest]`."""
    table = values.new_full((len(batch), int(batch.lengths.max())), fill)
    table[batch.sequence.to(values.device), _number(batch).to(values.device)] = values
    return table


def flat(batch: Batch, table: Tensor) -> Tensor:
    """The tokens of such a table: `[S, longest]` to `[M]`."""
    return table[batch.sequence.to(table.device), _number(batch).to(table.device)]


def mean_by_number(batch: Batch, values: Tensor) -> Tensor:
    """Mean of a per-token array over all first tokens, all second tokens, ...: `[M]` to `[longest]`.

    Of a weight it shows how fast the weights die away along a completion.
    """
    number = _number(batch).to(values.device)
    count = torch.bincount(number)
    return values.new_zeros(len(count)).index_add(0, number, values) / count


def _number(batch: Batch) -> Tensor:
    """Number of each token among its sequence's action tokens, from 0: `[M]`."""
    lengths = batch.lengths
    begins = lengths.cumsum(0) - lengths
    return torch.arange(batch.target.numel(), device=lengths.device) - begins[batch.sequence]
