r"""Masks by the divergence of two policies instead of their ratio, and clipping inside a geometric mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from posttrain.objective.batch import Batch
from posttrain.objective.denominator import Ratio, old_logp
from posttrain.objective.mask import Kept


@dataclass(frozen=True, slots=True)
class DivergenceBand:
    r"""A token whose probability has moved too far in the direction that its advantage asks for has no gradient.

    `tv`: :math:`|\pi - \pi_{old}|` of the sampled token; `kl`: the KL of the two-outcome distributions (this token or
    another). A ratio's band is wide for likely tokens and narrow for rare ones; a divergence's is the other way round.
    Reference: Rethinking the trust region in LLM reinforcement learning, 2026, arXiv 2602.04879.
    """

    low: float = 0.2
    high: float = 0.2
    kind: Literal["tv", "kl"] = "tv"

    def __call__(self, batch: Batch, ratio: Ratio, advantage: Tensor) -> Kept:
        assert ratio.logp is not None
        now, before = ratio.logp.exp(), (ratio.logp - ratio.log_ratio).exp()
        far = (now - before).abs()
        if self.kind == "kl":
            rest = torch.log1p(-before.clamp(max=1 - 1e-7)) - torch.log1p(-now.clamp(max=1 - 1e-7))
            far = -before * ratio.log_ratio + (1 - before) * rest
        over = (advantage > 0) & (now > before) & (far > self.high)
        under = (advantage <= 0) & (now < before) & (far > self.low)
        return Kept(~(over | under), torch.zeros_like(now))


@dataclass(frozen=True, slots=True)
class ClippedGeometricMean:
    r"""One ratio a sequence: the geometric mean of its tokens' ratios, each clipped on the side that its advantage asks
    for before the mean is taken (GMPO). A few outlying tokens move it far less than they move an arithmetic mean.

    low, high: the band of a token's log-ratio. Pair with `InsideBand` of the same band, which takes the gradient off
    the clipped tokens.
    """

    low: float = 0.4
    high: float = 0.4

    def __call__(self, batch: Batch, logp: Tensor) -> Ratio:
        assert batch.advantage is not None
        token = logp.detach() - old_logp(batch, logp)
        outside = _outside(token, batch.advantage.to(token.device), self.low, self.high)
        clipped = torch.where(outside, token.clamp(-self.low, self.high), token)
        value = batch.spread(batch.mean(clipped)).exp()
        return Ratio(value, value, token)


@dataclass(frozen=True, slots=True)
class InsideBand:
    """Tokens whose log-ratio is clipped inside the geometric mean have no gradient; the sequence's ratio stays."""

    low: float = 0.4
    high: float = 0.4

    def __call__(self, batch: Batch, ratio: Ratio, advantage: Tensor) -> Kept:
        return Kept(~_outside(ratio.log_ratio, advantage, self.low, self.high), ratio.value)


def _outside(log_ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    return ((advantage > 0) & (log_ratio > high)) | ((advantage < 0) & (log_ratio < -low))
