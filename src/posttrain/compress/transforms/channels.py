"""Channels of any layer's inputs scaled when the model runs."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.compress.packed.inputs import InputStep


class ChannelStep(InputStep):
    """Inputs divided by a scale of their channel. scale: `[in]` fp32."""

    kind = "channels"
    scale: Tensor

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.register_buffer("scale", torch.ones(width))

    def forward(self, inputs: Tensor) -> Tensor:
        return (inputs.float() / self.scale).to(inputs.dtype)
