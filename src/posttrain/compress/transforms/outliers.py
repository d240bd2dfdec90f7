"""CBQ's scaling of outlying channels: those that the split finds, by the root of how far they stick out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.compress.fold import change, parameters
from posttrain.compress.solvers.cbq import COARSE, FINE, reserved_limit
from posttrain.compress.structure import foldable, norm_outputs
from posttrain.compress.transforms.transform import Transform
from posttrain.compress.walk import Block
from posttrain.trajectory import PosttrainError


@dataclass(frozen=True)
class OutlierScaling(Transform):
    r"""Channels of a norm's output whose largest value is an outlier among all channels' are divided by

    .. math:: s_j = \sqrt{\max|X_j| / \max(\text{reserved})},

    which goes into the norm's gain and the columns of the layers that read it; other channels stay. Which channels
    stick out is told by `reserved_limit`, of the channels' largest sizes. The inputs of a layer that another feeds
    channel by channel without attention between (up into down) are scaled alike.

    coarse, fine: λ1 and λ2 of the split.

    Reference: CBQ, 2023, arXiv 2312.07950 (card 147).
    """

    coarse: float = COARSE
    fine: float = FINE

    def __post_init__(self) -> None:
        if self.coarse < 0 or self.fine < 0:
            raise PosttrainError(f"coarse {self.coarse}, fine {self.fine}: expected numbers from 0 on")

    def apply_to_block(self, block: Block) -> None:
        found = foldable(block, "CBQ's scaling of outliers")
        moments = norm_outputs(block, [site.norm for site in found.norms])
        for site in found.norms:
            if any(name in block.linears for name in site.linears):
                scale = self.scaling(moments[site.norm].absmax)
                change(block.module, site.scaled(parameters(block.module), scale))
        for pair in found.pairs:
            if not pair.attention and pair.one_to_one and pair.second in block.linears:
                met = block.moments([pair.second], gram=False)[pair.second]
                change(block.module, pair.scaled(parameters(block.module), self.scaling(met.absmax)))

    def scaling(self, absmax: Tensor) -> Tensor:
        """`[in]` s, from the largest size of each channel."""
        limit = reserved_limit(absmax, self.coarse, self.fine)
        if limit <= 0:
            return torch.ones_like(absmax)
        return torch.where(absmax > limit, (absmax / limit).sqrt(), torch.ones_like(absmax))
