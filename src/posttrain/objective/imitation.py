r"""Imitation with a say of the policy's: how much a token is imitated by what the policy makes of it.

`Demonstration` (advantage.py) imitates every token alike. Here are the weights that depend on the policy's own
probability or entropy, and on whether a completion of its own was right.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from posttrain.objective.advantage import Credit, Demonstration, Fixed
from posttrain.objective.batch import Batch
from posttrain.objective.denominator import Ratio
from posttrain.objective.divergence import Need
from posttrain.objective.likelihood import Likelihood
from posttrain.objective.mask import Kept
from posttrain.objective.schedule import Coefficient

ROUNDING = 1e-6  # of rewards in fp32


def succeeded(batch: Batch, success: float) -> Tensor:
    """Whether each sequence's reward reaches `success`, up to rounding: `[S]` bool."""
    return batch.reward >= success - ROUNDING


@dataclass(frozen=True)
class Uncertain(Demonstration):
    r"""Imitate a token in proportion to :math:`p(1-p)`, p its probability now (CHORD-φ, card 009).

    Tokens that the policy knows (p near 1) and tokens foreign to it (p near 0) are left alone. The gradient with
    respect to the token's logit is largest at p = 1/3.
    """

    def credit(self, batch: Batch, logp: Tensor) -> Credit:
        now = logp.detach()
        # 1 - p by expm1: a difference of rounded numbers would be 0 for p near 1
        return Credit(super().credit(batch, logp).advantage * now.exp() * -torch.expm1(now))


def first_of_its_kind(batch: Batch) -> Tensor:
    """Whether no earlier sequence of the same group has the same tokens: `[S]` bool."""
    first: dict[tuple[int, ...], int] = {}
    for i, (group, tokens) in enumerate(zip(batch.group.tolist(), batch.tokens, strict=True)):
        first.setdefault((group, *tokens.tolist()), i)
    found = torch.zeros(len(batch), dtype=torch.bool)
    found[list(first.values())] = True
    return found


@dataclass(frozen=True)
class Accepted(Fixed):
    """Imitate the completions whose reward reaches `success`, and no other (rejection sampling, card 046).

    Their advantage is 1 over their share of the step's tokens, so that a mean over all tokens is one over theirs.
    distinct: of a group's equal completions only the first (expert iteration, card 121).
    """

    success: float = 1.0
    distinct: bool = False

    def of(self, batch: Batch) -> Tensor:
        accepted = succeeded(batch, self.success).to(batch.reward.dtype)
        if self.distinct:
            accepted = accepted * first_of_its_kind(batch)
        share = (accepted * batch.lengths).sum() / batch.target.numel()
        return accepted / share if share > 0 else accepted


@dataclass(frozen=True)
class Failure(Fixed):
    """-1 for completions whose reward does not reach `success`, 0 for the others."""

    success: float = 1.0

    def of(self, batch: Batch) -> Tensor:
        return -(~succeeded(batch, self.success)).to(batch.reward.dtype)


@dataclass(frozen=True, slots=True)
class EntropyWeighted:
    r"""Imitation as an added term, in proportion to :math:`e^{\pm H}`, H the mean entropy (nats a token) of the
    sequence under the present policy (SRFT, card 046):

    .. math:: -\mathrm{sg}[e^{\pm H}]\,\log\pi_\theta

    sign: -1 imitates what the policy is certain at, +1 what it is uncertain at. success: imitate only sequences whose
    reward reaches it.
    """

    coefficient: Coefficient = 0.5
    sign: Literal[-1, 1] = -1
    success: float | None = None
    name: ClassVar[str] = "entropy_weighted_nll"
    needs: ClassVar[frozenset[Need]] = frozenset({"entropy"})

    def __call__(self, batch: Batch, likelihood: Likelihood) -> Tensor:
        assert likelihood.entropy is not None
        weight = (self.sign * batch.mean(likelihood.entropy.detach())).exp()
        if self.success is not None:
            weight = weight * succeeded(batch, self.success)
        return -batch.spread(weight) * likelihood.logp


@dataclass(frozen=True, slots=True)
class Cutoff:
    """Tokens more probable than `probability` have no gradient: their log-probability counts as that of the bound."""

    probability: float = 1.0

    def __call__(self, batch: Batch, ratio: Ratio, advantage: Tensor) -> Kept:
        assert ratio.logp is not None
        bound = math.log(self.probability)
        return Kept(ratio.logp <= bound, bound * ratio.weight)
