"""Norm gains folded into the layers that read them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from posttrain.compress.fold import change, parameters
from posttrain.compress.structure import foldable
from posttrain.compress.transforms.transform import Transform
from posttrain.compress.walk import Block


@dataclass(frozen=True)
class FoldedGains(Transform):
    """The gains of norms without a bias become 1 and multiply the columns of what reads the norms.

    What the layers are given is then the normed stream itself, whose channels are of one size.

    Reference: as in QuaRot (card 000, section 8) and Quamba (card 142).
    """

    def apply_to_block(self, block: Block) -> None:
        for site in foldable(block, "Folding of gains").norms:
            if site.bias:
                continue
            now = parameters(block.module)
            gain = site.gain(now)
            ones = {f"{site.norm}.weight": torch.ones_like(gain) - site.offset}  # also where a gain is 0
            change(block.module, {**site.scaled(now, gain), **ones})
