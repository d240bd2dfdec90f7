r"""Holding back the tokens that take the most entropy away: those whose advantage and log-probability covary most.

Under a policy-gradient step the entropy falls by about the covariance of advantage and log-probability; a few tokens in
ten thousand make up most of it. They are chosen once a step, over the whole step, from the log-probabilities before its
first update (peers choose anew in every minibatch), so micro-batches cannot change which ones they are.
Reference: The entropy mechanism of reinforcement learning for reasoning language models, 2025, arXiv 2505.22617.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from posttrain.objective.batch import Batch
from posttrain.objective.denominator import Ratio, old_logp
from posttrain.objective.divergence import Need
from posttrain.objective.likelihood import Likelihood
from posttrain.objective.mask import Kept
from posttrain.objective.schedule import Coefficient


def covariances(batch: Batch) -> Tensor:
    """Each token's share of the covariance of advantage and log-probability over the step, `[M]`."""
    if batch.advantage is None or batch.old_logp is None:
        raise RuntimeError("covariances need advantages and the log-probabilities before the step's first update")
    advantage, logp = batch.advantage, batch.old_logp
    return (advantage - advantage.mean()) * (logp - logp.mean())


@dataclass(frozen=True)
class DropHighCovariance:
    """Clip-Cov: a share of the step's tokens, drawn at random from those whose covariance lies between `low` and
    `high`, has no gradient.
    """

    share: float = 2e-4
    low: float = 1.0
    high: float = 5.0
    needs: ClassVar[frozenset[Need]] = frozenset({"old_logp"})

    def prepare(self, batch: Batch) -> None:
        found = covariances(batch)
        between = ((found > self.low) & (found < self.high)).nonzero()[:, 0]
        count = min(max(int(self.share * len(found)), 1), len(between))
        order = torch.randperm(len(between), generator=torch.Generator().manual_seed(batch.step))
        dropped = torch.zeros(len(found), dtype=torch.bool)
        dropped[between[order[:count]]] = True
        batch.extras["high_covariance"] = dropped

    def __call__(self, batch: Batch, ratio: Ratio, advantage: Tensor) -> Kept:
        return Kept(~batch.extras["high_covariance"], torch.zeros_like(advantage))


@dataclass(frozen=True)
class HighCovarianceKL:
    r"""KL-Cov: a penalty :math:`|\log\pi_\theta - \log\pi_{old}|` on the `share` of tokens of highest covariance.

    Its gradient is 0 before the first update of a step: it holds back the second and later ones.
    """

    coefficient: Coefficient = 1.0
    share: float = 2e-4
    name: ClassVar[str] = "high_covariance_kl"
    needs: ClassVar[frozenset[Need]] = frozenset({"old_logp"})

    def prepare(self, batch: Batch) -> None:
        found = covariances(batch)
        chosen = torch.zeros(len(found), dtype=torch.bool)
        chosen[found.topk(max(1, int(self.share * len(found)))).indices] = True
        batch.extras["highest_covariance"] = chosen

    def __call__(self, batch: Batch, likelihood: Likelihood) -> Tensor:
        apart = (likelihood.logp - old_logp(batch, likelihood.logp)).abs()
        return torch.where(batch.extras["highest_covariance"].to(apart.device), apart, 0)
