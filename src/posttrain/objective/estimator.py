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

from posttrain.objective.advantage import Advantage, Credit
from posttrain.objective.aggregate import Aggregate, TokenMean
from posttrain.objective.batch import Batch, Totals
from posttrain.objective.denominator import CurrentPolicy, Denominator, Ratio
from posttrain.objective.divergence import Divergence, FullKL, Need, Reporting
from posttrain.objective.likelihood import Likelihood
from posttrain.objective.mask import Mask
from posttrain.objective.schedule import at


@dataclass(slots=True)
class Loss:
    """surrogate: 0-d, differentiable: backpropagate this. value: the paper's loss, a number, this micro-batch's share
    of the step's. metrics: name -> (sum, count), to be added over micro-batches.
    """

    surrogate: Tensor
    value: Tensor
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(slots=True)
class Weights:
    """A micro-batch as the estimator sees it, `[M]` each but for `credit` and `ratio`: aggregation weight, credit,
    ratio, which tokens keep their gradient, and what the paper's loss has in the ratio's place.
    """

    weight: Tensor
    credit: Credit
    ratio: Ratio
    keep: Tensor
    factor: Tensor

    def of_score(self, which: Tensor) -> Tensor:
        """What multiplies the gradient of each token's log-probability in the objective of the tokens `which`."""
        found = self.weight * torch.where(which, self.ratio.weight * self.credit.advantage, 0).detach()
        unit = self.ratio.unit
        if unit is None:
            return found
        size = torch.bincount(unit)
        return (found.new_zeros(len(size)).index_add(0, unit, found) / size)[unit]


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
        of_masks: list[frozenset[Need]] = [getattr(m, "needs", frozenset()) for m in self.masks]
        return self.advantage.needs.union(*(d.needs for d in self.divergences), *of_masks)

    @property
    def full_divergence(self) -> FullKL | None:
        """The divergence over the full vocabulary, if one is asked for (the fused operator computes one at a time)."""
        found = [d for d in self.divergences if isinstance(d, FullKL)]
        if len(found) > 1:
            raise ValueError("an objective can hold one full-vocabulary divergence")
        return found[0] if found else None

    @property
    def keep_groups(self) -> bool:
        """Whether micro-batches must hold whole groups."""
        return self.advantage.keep_groups

    @property
    def minimum_group(self) -> int:
        """Completions a prompt below which every advantage would be 0."""
        return getattr(self.advantage, "minimum_group", 1)

    @property
    def parts(self) -> tuple[object, ...]:
        return (self.advantage, self.denominator, *self.masks, self.aggregate, *self.divergences)

    def prepare(self, batch: Batch) -> None:
        """Set what can be computed once, over the whole step."""
        self.advantage.prepare(batch)
        for part in (*self.masks, *self.divergences):
            if hasattr(part, "prepare"):
                part.prepare(batch)

    def replace(self, **parts: object) -> Objective:
        return replace(self, **parts)  # type: ignore[arg-type]

    def weights(self, batch: Batch, likelihood: Likelihood, totals: Totals) -> Weights:
        """Credit, ratio and masks of a micro-batch."""
        logp = likelihood.logp
        weight = self.aggregate(batch, totals).to(logp.device)
        credit = self.advantage.credit(batch, logp)
        ratio = self.denominator(batch, logp)
        ratio.logp = logp.detach()
        ratio.entropy = None if likelihood.entropy is None else likelihood.entropy.detach()
        keep = torch.ones_like(logp, dtype=torch.bool)
        factor = ratio.value
        for mask in self.masks:
            kept = mask(batch, ratio, credit.advantage)
            factor = torch.where(kept.keep, factor, kept.bound)
            keep &= kept.keep
        return Weights(weight, credit, ratio, keep, factor)

    def __call__(self, batch: Batch, likelihood: Likelihood, totals: Totals) -> Loss:
        """Loss of a micro-batch; `totals` counts the whole step."""
        logp = likelihood.logp
        weighed = self.weights(batch, likelihood, totals)
        weight, credit, ratio, keep, factor = (
            weighed.weight, weighed.credit, weighed.ratio, weighed.keep, weighed.factor,
        )  # fmt: skip
        metrics: dict[str, tuple[float, float]] = {}
        if self.masks:
            metrics["clip_fraction"] = (float((~keep).sum()), keep.numel())
        surrogate = -(weighed.of_score(keep) * logp).sum()
        if credit.value is None:
            value = -(weight * factor * credit.advantage).sum()
        else:
            first = (batch.lengths.cumsum(0) - batch.lengths).to(weight.device)
            value = (weight[first] * credit.value).sum()
        for divergence in self.divergences:
            term = divergence(batch, likelihood)
            share = at(divergence.coefficient, batch) * (weight * term).sum()
            surrogate, value = surrogate + share, value + share.detach()
            metrics[divergence.name] = (float(term.detach().sum()), term.numel())
            if isinstance(divergence, Reporting):
                found = divergence.figures(batch, likelihood)
                metrics |= {name: (float(values.sum()), values.numel()) for name, values in found.items()}
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
            # chi2(policy || sampler): the variance of the importance weights, in fp64 since they may be far apart
            metrics["sampler_chi2"] = (float(torch.expm1(-apart.double()).square().sum()), apart.numel())
            if batch.old_logp is not None:  # the latter alone: both with the weights that sampled
                apart = (batch.behaviour_logp_full - batch.old_logp)[sampled]
                metrics["engine_kl"] = (float(apart.sum()), apart.numel())
        return Loss(surrogate, value.detach(), metrics)
