r"""Denominators for tokens that the policy did not write: demonstrations among the rollouts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from posttrain.objective.batch import Batch
from posttrain.objective.denominator import CurrentPolicy, Denominator, OldPolicy, Ratio
from posttrain.trajectory import SOURCES


@dataclass(frozen=True, slots=True)
class Probability:
    """Divide by one, where the loss is the probability itself: the gradient is that of `One`, the loss is not DFT's."""

    def __call__(self, batch: Batch, logp: Tensor) -> Ratio:
        p = logp.detach().exp()
        return Ratio(p, p, torch.zeros_like(p))


@dataclass(frozen=True, slots=True)
class Shaped:
    r"""Divide by one, and shape the probability: :math:`f(\pi) = \pi/(\pi+\gamma)` (LUFFY, card 046).

    The weight :math:`\pi f'(\pi) = \gamma\pi/(\pi+\gamma)^2` is largest (1/4) at π = γ: tokens of low probability,
    which a plain π would hardly move, are learned from.
    """

    gamma: float = 0.1

    def __call__(self, batch: Batch, logp: Tensor) -> Ratio:
        p = logp.detach().exp()
        return Ratio(self.gamma * p / (p + self.gamma) ** 2, p / (p + self.gamma), torch.zeros_like(p))


@dataclass(frozen=True, slots=True)
class BySource:
    """One denominator for the tokens that the policy wrote, another for those of anyone else (expert, teacher)."""

    policy: Denominator = field(default_factory=OldPolicy)
    others: Denominator = field(default_factory=CurrentPolicy)

    def __call__(self, batch: Batch, logp: Tensor) -> Ratio:
        assert batch.token_source is not None
        mine = (batch.token_source == SOURCES.index("policy")).to(logp.device)
        own, other = self.policy(batch, logp), self.others(batch, logp)
        return Ratio(
            torch.where(mine, own.weight, other.weight),
            torch.where(mine, own.value, other.value),
            torch.where(mine, own.log_ratio, other.log_ratio),
        )
