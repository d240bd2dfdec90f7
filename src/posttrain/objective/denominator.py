r"""Denominators: what the policy's probability is divided by, and so how much weight each token's gradient has.

Each returns a `Ratio`: `weight` multiplies :math:`\hat A\,\nabla\log\pi_\theta` (constant), `value` is what the paper's
own loss writes there (so that the reported loss is the paper's), `log_ratio` is what masks look at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from posttrain.objective.batch import Batch


@dataclass(slots=True)
class Ratio:
    """weight, value, log_ratio: `[M]` fp32, constant. For masks the estimator adds the policy's present log-probability
    and, where it was computed, its entropy: `[M]` fp32, constant. unit: `[M]` int64, from 0 without gaps, where one
    ratio is a mean over several tokens with credit of their own: its gradient gives each of them the unit's mean.
    """

    weight: Tensor
    value: Tensor
    log_ratio: Tensor
    logp: Tensor | None = None
    entropy: Tensor | None = None
    unit: Tensor | None = None


class Denominator(Protocol):
    def __call__(self, batch: Batch, logp: Tensor) -> Ratio: ...


def old_logp(batch: Batch, logp: Tensor) -> Tensor:
    """Log-probabilities under the weights that sampled; the present ones where no update has happened since."""
    return batch.old_logp if batch.old_logp is not None else logp.detach()


@dataclass(frozen=True, slots=True)
class CurrentPolicy:
    """Divide by the policy itself: ratio 1, the gradient of plain log-likelihood (SFT, REINFORCE, preferences)."""

    def __call__(self, batch: Batch, logp: Tensor) -> Ratio:
        logp = logp.detach()
        return Ratio(torch.ones_like(logp), logp, torch.zeros_like(logp))


@dataclass(frozen=True, slots=True)
class One:
    """Divide by one: every token is weighted with its own probability (DFT, card 051)."""

    def __call__(self, batch: Batch, logp: Tensor) -> Ratio:
        logp = logp.detach()
        return Ratio(logp.exp(), logp.exp() * logp, torch.zeros_like(logp))


@dataclass(frozen=True, slots=True)
class OldPolicy:
    r"""Divide by the policy that sampled, token by token: :math:`\rho_t = \pi_\theta / \pi_{old}` (PPO, GRPO)."""

    def __call__(self, batch: Batch, logp: Tensor) -> Ratio:
        log_ratio = logp.detach() - old_logp(batch, logp)
        return Ratio(log_ratio.exp(), log_ratio.exp(), log_ratio)


@dataclass(frozen=True, slots=True)
class OldPolicySequence:
    r"""One ratio a sequence, the geometric mean of its tokens' (GSPO): :math:`s = (\prod_t \rho_t)^{1/T}`.

    The mean is over the tokens, not their sum: a sum grows with length until everything is clipped.
    """

    def __call__(self, batch: Batch, logp: Tensor) -> Ratio:
        log_ratio = batch.spread(batch.mean(logp.detach() - old_logp(batch, logp)))
        return Ratio(log_ratio.exp(), log_ratio.exp(), log_ratio)


@dataclass(frozen=True, slots=True)
class OldPolicyCompletion:
    r"""One ratio a sequence, the product of its tokens': the whole completion is one action (RLOO).

    .. math:: \rho = \prod_t \rho_t,\qquad \nabla\rho = \rho\sum_t\nabla\log\pi_\theta

    The weight is :math:`T\rho`, so that a mean over the T tokens (`SequenceMean`) gives that sum. Its spread grows with
    length: for several updates on the same rollouts prefer `OldPolicySequence`.
    """

    def __call__(self, batch: Batch, logp: Tensor) -> Ratio:
        log_ratio = batch.spread(batch.sum(logp.detach() - old_logp(batch, logp)))
        value = log_ratio.exp()
        return Ratio(batch.spread(batch.lengths.to(logp)) * value, value, log_ratio)


@dataclass(frozen=True, slots=True)
class ClippedWeight:
    r"""The token ratio with an upper bound, as a constant weight (CISPO): no token loses its gradient.

    .. math:: w_t = \mathrm{sg}[\min(\rho_t, \text{high})]
    """

    high: float = 5.0

    def __call__(self, batch: Batch, logp: Tensor) -> Ratio:
        log_ratio = logp.detach() - old_logp(batch, logp)
        weight = log_ratio.exp().clamp(max=self.high)
        return Ratio(weight, weight * logp.detach(), log_ratio)
