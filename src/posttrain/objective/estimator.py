r"""The one objective: a surrogate whose gradient is every method's.

.. math::
    L = -\sum_i\sum_t z_{it}\;\mathrm{sg}[\mathrm{mask}\cdot\mathrm{ratio}\cdot\hat A]\;\log\pi_\theta(a_{it}|s_{it})
        + \sum_k c_k\,D_k

`z` is the aggregation (1/Z), sg a stop-gradient. The loss that is reported is the paper's own value, while the gradient
is the surrogate's: the two agree wherever the paper's loss is differentiable (tests hold that, method by method).
Reference: the unified policy gradient estimator, 2025, arXiv 2509.04419 (card 046).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from posttrain.objective.advantage import Advantage
from posttrain.objective.aggregate import Aggregate, TokenMean
from posttrain.objective.batch import Batch, Totals
from posttrain.objective.denominator import CurrentPolicy, Denominator
from posttrain.objective.divergence import Divergence, FullKL, Need
from posttrain.objective.likelihood import Likelihood
from posttrain.objective.mask import Mask


@dataclass(slots=True)
class Loss:
    """surrogate: 0-d, differentiable: backpropagate this. value: the paper's loss, a number, this micro-batch's share
    of the step's. metrics: name -> (sum, count), to be added over micro-batches.
    """

    surrogate: Tensor
    value: Tensor
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Objective:
    """A choice of parts. See the module for the formula, the parts' own modules for what there is to choose."""

    advantage: Advantage
    denominator: Denominator = field(default_factory=CurrentPolicy)
    masks: tuple[Mask, ...] = ()
    aggregate: Aggregate = field(default_factory=TokenMean)
    divergences: tuple[Divergence, ...] = ()

    @property
    def needs(self) -> frozenset[Need]:
        """Signals that the training loop must supply with the batch."""
        return self.advantage.needs.union(*(d.needs for d in self.divergences))

    @property
    def full_divergence(self) -> FullKL | None:
        """The divergence over the full vocabulary, if one is asked for (the fused operator computes one at a time)."""
        found = [d for d in self.divergences if isinstance(d, FullKL)]
        if len(found) > 1:
            raise ValueError("an objective can hold one full-vocabulary divergence")
        return found[0] if found else None

    def replace(self, **parts: object) -> Objective:
        return replace(self, **parts)  # type: ignore[arg-type]

    def __call__(self, batch: Batch, likelihood: Likelihood, totals: Totals) -> Loss:
        """Loss of a micro-batch; `totals` counts the whole step."""
        logp = likelihood.logp
        weight = self.aggregate(batch, totals).to(logp.device)
        credit = self.advantage.credit(batch, logp)
        ratio = self.denominator(batch, logp)
        keep = torch.ones_like(logp, dtype=torch.bool)
        factor = ratio.value
        metrics: dict[str, tuple[float, float]] = {}
        for mask in self.masks:
            kept = mask(batch, ratio, credit.advantage)
            factor = torch.where(kept.keep, factor, kept.bound)
            keep &= kept.keep
        if self.masks:
            metrics["clip_fraction"] = (float((~keep).sum()), keep.numel())
        coefficient = torch.where(keep, ratio.weight * credit.advantage, 0).detach()
        surrogate = -(weight * coefficient * logp).sum()
        if credit.value is None:
            value = -(weight * factor * credit.advantage).sum()
        else:
            first = (batch.lengths.cumsum(0) - batch.lengths).to(weight.device)
            value = (weight[first] * credit.value).sum()
        for divergence in self.divergences:
            term = divergence(batch, likelihood)
            share = divergence.coefficient * (weight * term).sum()
            surrogate, value = surrogate + share, value + share.detach()
            metrics[divergence.name] = (float(term.detach().sum()), term.numel())
        for name, values in (credit.metrics or {}).items():
            metrics[name] = (float(values.sum()), values.numel())
        if likelihood.entropy is not None:
            metrics["entropy"] = (float(likelihood.entropy.detach().sum()), logp.numel())
        if batch.old_logp is not None:
            metrics["ratio"] = (float(ratio.log_ratio.exp().sum()), logp.numel())
        metrics["logp"] = (float(logp.detach().sum()), logp.numel())
        sampled = torch.isfinite(batch.behaviour_logp_full)
        if bool(sampled.any()):
            # KL(sampler || policy): staleness, and what the engine computes differently from the trainer
            apart = (batch.behaviour_logp_full - logp.detach())[sampled]
            metrics["sampler_kl"] = (float(apart.sum()), apart.numel())
        return Loss(surrogate, value.detach(), metrics)
