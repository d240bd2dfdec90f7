r"""Credit from preferences: DPO and its family, KTO.

A preference loss is any function of sequence scores; its credit to a token is minus the derivative of that function
with respect to the token's log-probability. Here each variant is written as its paper writes it, and the derivative is
taken on the few numbers of a batch (one score a sequence), never through the model.

Scores: :math:`r = \sum_t \log\pi_\theta - \log\pi_{ref}` (log-ratio) unless said otherwise; c chosen, r rejected.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.objective.advantage import Credit
from posttrain.objective.batch import Batch
from posttrain.objective.divergence import Need


@dataclass(slots=True)
class Pair:
    """Sequence scores of P pairs, `[P]` each: summed log-probabilities of chosen and rejected under the policy and the
    reference (0 without one), and their lengths in action tokens.
    """

    chosen: Tensor
    rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_length: Tensor
    rejected_length: Tensor

    @property
    def chosen_ratio(self) -> Tensor:
        return self.chosen - self.reference_chosen

    @property
    def rejected_ratio(self) -> Tensor:
        return self.rejected - self.reference_rejected

    @property
    def margin(self) -> Tensor:
        return self.chosen_ratio - self.rejected_ratio


PairLoss = Callable[[Pair], Tensor]  # a Pair to `[P]`


@dataclass(frozen=True)
class Preference:
    """Credit from pairs by a loss of the pair. reference: whether the loss looks at a reference model."""

    loss: PairLoss
    reference: bool = True
    keep_groups: ClassVar[bool] = True

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({"reference_logp"}) if self.reference else frozenset()

    def prepare(self, batch: Batch) -> None:
        _pairs(batch)  # raises early when a pair is incomplete

    def credit(self, batch: Batch, logp: Tensor) -> Credit:
        chosen, rejected = _pairs(batch)
        with torch.enable_grad():
            score = batch.sum(logp.detach()).requires_grad_()
            base = torch.zeros_like(score)
            if self.reference:
                assert batch.reference_logp is not None
                base = batch.sum(batch.reference_logp)
            length = batch.lengths.to(score)
            pair = Pair(score[chosen], score[rejected], base[chosen], base[rejected], length[chosen], length[rejected])
            loss = self.loss(pair)
            (gradient,) = torch.autograd.grad(loss.sum(), score)
        value = torch.zeros_like(base)
        value[chosen] = loss.detach()
        margin = pair.margin.detach()
        metrics = {"accuracy": (margin > 0).float(), "margin": margin}
        return Credit(batch.spread(-gradient), value, metrics)


def _pairs(batch: Batch) -> tuple[Tensor, Tensor]:
    """Indices of the chosen and the rejected sequence of each group, `[P]` each."""
    chosen = (batch.label > 0).nonzero()[:, 0]
    rejected = (batch.label < 0).nonzero()[:, 0]
    order_c, order_r = batch.group[chosen].argsort(), batch.group[rejected].argsort()
    chosen, rejected = chosen[order_c], rejected[order_r]
    groups = batch.group.unique()  # sorted
    if not (torch.equal(batch.group[chosen], groups) and torch.equal(batch.group[rejected], groups)):
        raise ValueError("preference credit needs one chosen and one rejected sequence in every group")
    return chosen, rejected


# -- losses of a pair ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sigmoid:
    r""":math:`-(1-\epsilon)\log\sigma(\beta m) - \epsilon\log\sigma(-\beta m)` with m the margin (DPO; ε: cDPO)."""

    beta: float = 0.1
    label_smoothing: float = 0.0

    def __call__(self, pair: Pair) -> Tensor:
        x = self.beta * pair.margin
        return -(1 - self.label_smoothing) * F.logsigmoid(x) - self.label_smoothing * F.logsigmoid(-x)


@dataclass(frozen=True)
class Robust:
    r""":math:`[-(1-\epsilon)\log\sigma(\beta m) + \epsilon\log\sigma(-\beta m)] / (1-2\epsilon)`: unbiased when a share
    ε of the labels is flipped."""

    beta: float = 0.1
    label_smoothing: float = 0.1

    def __call__(self, pair: Pair) -> Tensor:
        x, e = self.beta * pair.margin, self.label_smoothing
        return (-(1 - e) * F.logsigmoid(x) + e * F.logsigmoid(-x)) / (1 - 2 * e)


@dataclass(frozen=True)
class Hinge:
    r""":math:`\max(0, 1 - \beta m)` (SLiC)."""

    beta: float = 0.1

    def __call__(self, pair: Pair) -> Tensor:
        return torch.relu(1 - self.beta * pair.margin)


@dataclass(frozen=True)
class IPO:
    r""":math:`(\bar m - \frac{1}{2\beta})^2`, m̄ the margin of log-ratios averaged over each answer's tokens."""

    beta: float = 0.1

    def __call__(self, pair: Pair) -> Tensor:
        margin = pair.chosen_ratio / pair.chosen_length - pair.rejected_ratio / pair.rejected_length
        return (margin - 1 / (2 * self.beta)) ** 2


@dataclass(frozen=True)
class LengthNormalised:
    r""":math:`-\log\sigma(\beta\bar m)`, m̄ the margin of log-ratios averaged over each answer's tokens (card 044)."""

    beta: float = 5.0

    def __call__(self, pair: Pair) -> Tensor:
        margin = pair.chosen_ratio / pair.chosen_length - pair.rejected_ratio / pair.rejected_length
        return -F.logsigmoid(self.beta * margin)


@dataclass(frozen=True)
class SimPO:
    r""":math:`-\log\sigma(\beta(\bar s_c - \bar s_r) - \gamma)`, s̄ the mean log-probability; no reference."""

    beta: float = 2.0
    gamma: float = 0.5
    label_smoothing: float = 0.0

    def __call__(self, pair: Pair) -> Tensor:
        mean = pair.chosen / pair.chosen_length - pair.rejected / pair.rejected_length
        x, e = self.beta * mean - self.gamma, self.label_smoothing
        return -(1 - e) * F.logsigmoid(x) - e * F.logsigmoid(-x)


@dataclass(frozen=True)
class OddsRatio:
    r""":math:`-\bar s_c - \lambda\log\sigma(\mathrm{logodds}(\bar s_c) - \mathrm{logodds}(\bar s_r))` (ORPO), with
    :math:`\mathrm{logodds}(s) = s - \log(1-e^s)` and s̄ the mean log-probability; no reference."""

    beta: float = 0.1

    def __call__(self, pair: Pair) -> Tensor:
        chosen, rejected = pair.chosen / pair.chosen_length, pair.rejected / pair.rejected_length
        odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
        return -chosen - self.beta * F.logsigmoid(odds)


@dataclass(frozen=True)
class APOZero:
    r""":math:`1 - \sigma(\beta r_c) + \sigma(\beta r_r)`: chosen up, rejected down."""

    beta: float = 0.1

    def __call__(self, pair: Pair) -> Tensor:
        return 1 - torch.sigmoid(self.beta * pair.chosen_ratio) + torch.sigmoid(self.beta * pair.rejected_ratio)


@dataclass(frozen=True)
class APODown:
    r""":math:`\sigma(\beta r_c) + 1 - \sigma(\beta(r_c - r_r))`: both down, rejected more."""

    beta: float = 0.1

    def __call__(self, pair: Pair) -> Tensor:
        return torch.sigmoid(self.beta * pair.chosen_ratio) + 1 - torch.sigmoid(self.beta * pair.margin)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, without cancellation near 0."""
    x = x.clamp(max=-1e-7)
    return torch.where(x > -0.6931, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


# -- unpaired feedback -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KTO:
    r"""Unpaired desirable and undesirable answers (2024, arXiv 2402.01306):

    .. math:: w_d\,[1-\sigma(\beta(r - z_0))]\ \text{if desirable},\quad w_u\,[1-\sigma(\beta(z_0 - r))]\ \text{if not}

    with :math:`z_0 = \max(0, KL)`, a constant: the mean log-ratio, over the whole step, of answers put behind another
    row's prompt. The loop supplies it as the signal `mismatched_kl`, in `batch.extras["mismatched_kl"]` `[M]`.
    """

    beta: float = 0.1
    desirable: float = 1.0
    undesirable: float = 1.0
    needs: ClassVar[frozenset[Need]] = frozenset({"reference_logp", "mismatched_kl"})
    keep_groups: ClassVar[bool] = False

    def prepare(self, batch: Batch) -> None:
        if bool((batch.label == 0).any()):
            raise ValueError("KTO needs every answer labelled desirable (chosen) or undesirable (rejected)")

    def credit(self, batch: Batch, logp: Tensor) -> Credit:
        assert batch.reference_logp is not None
        with torch.enable_grad():
            ratio = batch.sum(logp.detach() - batch.reference_logp).requires_grad_()
            z = batch.extras["mismatched_kl"][0].clamp(min=0)
            good = batch.label > 0
            loss = torch.where(
                good,
                self.desirable * (1 - torch.sigmoid(self.beta * (ratio - z))),
                self.undesirable * (1 - torch.sigmoid(self.beta * (z - ratio))),
            )
            (gradient,) = torch.autograd.grad(loss.sum(), ratio)
        metrics = {"accuracy": ((ratio.detach() > z) == good).float(), "mismatched_kl": z.expand(1)}
        return Credit(batch.spread(-gradient), loss.detach(), metrics)
