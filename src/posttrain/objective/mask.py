"""Masks: which tokens keep their gradient. Stabilisation is a choice of tokens, not another loss.

Each returns `keep` `[M]` (bool) and `bound` `[M]` (what the paper's loss has in the ratio's place where it is masked;
0 where the token simply drops out).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from posttrain.objective.batch import Batch
from posttrain.objective.denominator import Ratio
from posttrain.trajectory import SOURCES


@dataclass(slots=True)
class Kept:
    keep: Tensor
    bound: Tensor


class Mask(Protocol):
    def __call__(self, batch: Batch, ratio: Ratio, advantage: Tensor) -> Kept: ...


@dataclass(frozen=True, slots=True)
class Clip:
    r"""PPO's clipping as a mask: a token whose ratio already moved past the band in the direction that its advantage
    asks for has no gradient (`min(\rho A, \mathrm{clip}(\rho, 1-low, 1+high) A)` is constant there).

    On sequence ratios it masks whole sequences (GSPO).
    """

    low: float = 0.2
    high: float = 0.2

    def __call__(self, batch: Batch, ratio: Ratio, advantage: Tensor) -> Kept:
        rho = ratio.log_ratio.exp()
        over = (advantage > 0) & (rho > 1 + self.high)
        under = (advantage < 0) & (rho < 1 - self.low)
        bound = torch.full_like(rho, 1 - self.low).masked_fill(over, 1 + self.high)
        return Kept(~(over | under), bound)


@dataclass(frozen=True, slots=True)
class DropClipped(Clip):
    """The same tokens as `Clip`, of a loss in which they drop out instead of standing at the bound (MiniRL)."""

    def __call__(self, batch: Batch, ratio: Ratio, advantage: Tensor) -> Kept:
        keep = Clip.__call__(self, batch, ratio, advantage).keep
        return Kept(keep, torch.zeros_like(advantage))


@dataclass(frozen=True, slots=True)
class DualClip:
    """A ceiling on the ratio (`delta` > 1 + high) for negative advantages, where PPO's minimum is unbounded
    (dual-clip PPO, 2019, arXiv 1912.09729)."""

    delta: float = 10.0

    def __call__(self, batch: Batch, ratio: Ratio, advantage: Tensor) -> Kept:
        rho = ratio.log_ratio.exp()
        return Kept(~((advantage < 0) & (rho > self.delta)), torch.full_like(rho, self.delta))


@dataclass(frozen=True, slots=True)
class DropTruncated:
    """Sequences that ran into the length limit teach nothing (DAPO's overlong filtering). Their tokens still count in
    the mean, so that what is left is not weighted up."""

    def __call__(self, batch: Batch, ratio: Ratio, advantage: Tensor) -> Kept:
        keep = ~batch.spread(batch.truncated.to(advantage.device))
        return Kept(keep, torch.zeros_like(advantage))


@dataclass(frozen=True, slots=True)
class Plausible:
    """Tokens that another wrote and that the policy gives less than `floor` teach nothing: a negative advantage would
    push them down without end. Their places still count in the mean.
    """

    floor: float = 1e-6

    def __call__(self, batch: Batch, ratio: Ratio, advantage: Tensor) -> Kept:
        assert ratio.logp is not None
        assert batch.token_source is not None
        mine = (batch.token_source == SOURCES.index("policy")).to(ratio.logp.device)
        return Kept(mine | (ratio.logp >= math.log(self.floor)), torch.zeros_like(advantage))


@dataclass(frozen=True, slots=True)
class DropTies:
    """Pairs with the fact `tie` teach nothing: they stand in a step that has no pair with a winner."""

    def __call__(self, batch: Batch, ratio: Ratio, advantage: Tensor) -> Kept:
        tie = batch.facts["tie"] == 1 if "tie" in batch.facts else torch.zeros_like(batch.truncated)
        return Kept(~batch.spread(tie.to(advantage.device)), torch.zeros_like(advantage))
