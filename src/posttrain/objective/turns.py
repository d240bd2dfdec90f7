r"""Turns of a conversation as the unit of the ratio.

The environment answers a turn, not a token; so one ratio weighs all of a turn's tokens, as GSPO's weighs a sequence's.
Reference: ST-PPO, 2025, arXiv 2511.20718 (card 162).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.objective.batch import Batch
from posttrain.objective.denominator import Ratio, old_logp


def turns_of(batch: Batch) -> Tensor:
    """Number of each token's turn over the whole batch, `[M]` int64: from 0, without gaps."""
    width = int(batch.turn.max()) + 1 if len(batch.turn) else 1
    return (batch.sequence * width + batch.turn).unique(return_inverse=True)[1]


@dataclass(frozen=True, slots=True)
class OldPolicyTurn:
    r"""One ratio a turn, the geometric mean of its tokens' ratios: :math:`w^k = (\prod_{t \in k} \rho_t)^{1/|y^k|}`.

    Its gradient reaches all tokens of the turn alike, so each carries the mean of the turn's credit.
    """

    def __call__(self, batch: Batch, logp: Tensor) -> Ratio:
        unit = turns_of(batch).to(logp.device)
        size = torch.bincount(unit)
        token = logp.detach() - old_logp(batch, logp)
        log_ratio = (token.new_zeros(len(size)).index_add(0, unit, token) / size)[unit]
        return Ratio(log_ratio.exp(), log_ratio.exp(), log_ratio, unit=unit)
