"""The baseline of everything that was drawn for a prompt, where a group is a selection of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from posttrain.objective.advantage import Fixed
from posttrain.objective.batch import Batch


@dataclass(frozen=True)
class PoolBaseline(Fixed):
    r"""Reward minus the success rate of the prompt's whole pool (Reinforce-Ada, 2025, arXiv 2510.04996, card 128):

    .. math:: A_i = r_i - \bar r(x),\qquad \bar r(x) = \frac{p}{p + m}

    p right and m wrong completions were drawn, of which the group is a selection (facts `pool_mean`, `pool_size`). The
    advantages of a group do not sum to 0: rare successes count for more.

    scale: `pool` divides by the pool's unbiased standard deviation, :math:`\sqrt{\bar r(1-\bar r)N/(N-1)}` + `eps`.
    """

    scale: Literal["none", "pool"] = "none"
    eps: float = 1e-6

    def of(self, batch: Batch) -> Tensor:
        if "pool_mean" not in batch.facts or bool(batch.facts["pool_mean"].isnan().any()):
            raise RuntimeError("the pool's mean is unknown; this advantage needs a strategy that samples in pools")
        mean = batch.facts["pool_mean"]
        advantage = batch.reward - mean
        if self.scale == "none":
            return advantage
        size = batch.facts["pool_size"]
        spread = (mean * (1 - mean) * size / (size - 1).clamp(min=1)).sqrt()
        return torch.where(spread > 0, advantage / (spread + self.eps), torch.zeros_like(advantage))
