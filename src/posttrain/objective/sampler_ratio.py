r"""Importance against the engine that sampled, where it computes other probabilities than the trainer (TIS, MiniRL).

A token's ratio has two causes, which call for different cures:

.. math:: \frac{\pi_\theta}{\mu} = \underbrace{\frac{\pi_{old}}{\mu}}_{\text{discrepancy}}
          \cdot\underbrace{\frac{\pi_\theta}{\pi_{old}}}_{\text{staleness}}

:math:`\mu` is the policy as the engine computed it (another precision, other kernels, other experts), with the same
weights as :math:`\pi_{old}` in the trainer. The gradient is weighted with the whole ratio; masks look at the staleness
alone, which the updates can do something about.
Reference: Stabilizing reinforcement learning with LLMs, 2025, arXiv 2512.01374 (card 181).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.objective.batch import Batch
from posttrain.objective.denominator import Ratio, old_logp


@dataclass(frozen=True, slots=True)
class SamplerCorrected:
    r"""Weight a token with :math:`\mathrm{sg}[\min(\pi_\theta/\mu, \text{high})]`; masks look at
    :math:`\pi_\theta/\pi_{old}`.

    :math:`\mu` is the engine's probability over the full vocabulary at the sampling temperature. A token that no engine
    sampled (a demonstration's) has no discrepancy: its weight is the staleness alone, bounded likewise.
    """

    high: float = 5.0

    def __call__(self, batch: Batch, logp: Tensor) -> Ratio:
        logp = logp.detach()
        stale = logp - old_logp(batch, logp)
        sampled = batch.behaviour_logp_full
        weight = torch.where(sampled.isnan(), stale, logp - sampled).exp().clamp(max=self.high)
        return Ratio(weight, weight * logp, stale)
