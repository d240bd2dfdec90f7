"""CrossQuant's channel factors folded into the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from posttrain.compress.activations.crossquant import channel_factor
from posttrain.compress.packed.linear import TransformedLinear
from posttrain.compress.stacks import replace_module
from posttrain.compress.transforms.channels import ChannelStep
from posttrain.compress.transforms.transform import Transform
from posttrain.compress.walk import Block


@dataclass(frozen=True)
class CrossFold(Transform):
    """CrossQuant's channel factors moved into the weights: inputs are divided by c^(1-α), the weights multiplied.

    Then activations have one scale a token, t^α, as an integer product needs it; the price is that a layer's weights
    get as uneven as its inputs were. alpha: as of the activations.

    Reference: CrossQuant, 2024, arXiv 2410.07505 (card 140).
    """

    alpha: float = 0.15

    def apply_to_block(self, block: Block) -> None:
        for name, moments in block.moments(list(block.linears), gram=False).items():
            if not moments.count:  # a layer whose weight the block uses without calling it, as Mamba's dt_proj
                continue
            linear, step = block.linears[name], ChannelStep(block.linears[name].in_features)
            step.scale.copy_(channel_factor(moments.absmax, self.alpha))
            with torch.no_grad():
                linear.weight.copy_(linear.weight.float() * step.scale)
            replace_module(block.module, name, TransformedLinear.of(linear, nn.Sequential(step)))
