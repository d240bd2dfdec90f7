"""CrossQuant: an activation's step from the largest of its token and the largest of its channel together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.compress.activations.dynamic import check_bits, unless_zero
from posttrain.compress.activations.quantizer import Activations
from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.inputs import InputStep
from posttrain.compress.packed.linear import TransformedLinear
from posttrain.compress.transforms.channels import ChannelStep
from posttrain.trajectory import PosttrainError

SMALLEST = 1e-5  # of a channel's largest input: channels that were always 0


@dataclass(frozen=True)
class CrossQuant(Activations):
    r"""The step of input j of token i is :math:`t_i^\alpha c_j^{1-\alpha} / (2^{b-1} - 1)`.

    t_i is the largest input of the token, when the model runs; c_j the largest of the channel, of the calibration (if
    it were taken from the tokens at hand, a single token would be its own scale). Inputs beyond what the calibration
    saw are cut off. alpha: 1 is a step per token, 0 one per channel.

    A step of its own for each element is no scale of an integer product, unless the channels' part is folded into the
    weights (`transforms.channels`); where it was, what comes in is divided by c^(1-α) already, and the step is t_i^α.

    Reference: CrossQuant, 2024, arXiv 2410.07505 (card 140).
    """

    alpha: float = 0.15

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if not 0 <= self.alpha <= 1:
            raise PosttrainError(f"alpha is {self.alpha}; expected 0 (a step per channel) to 1 (a step per token)")

    @property
    def uses_data(self) -> bool:
        return True

    def fit(self, moments: InputMoments | None, width: int, name: str) -> CrossQuantStep:
        if moments is None or not moments.count:
            raise PosttrainError(f"{name} met no calibration token, so its inputs have no range; skip it or give more")
        made = CrossQuantStep(width, self.bits, self.alpha)
        made.channel.copy_(channel_factor(moments.absmax, self.alpha))
        return made

    def fit_layer(self, moments: InputMoments | None, layer: nn.Linear, name: str) -> CrossQuantStep:
        last = layer.inputs[-1] if isinstance(layer, TransformedLinear) else None
        if not isinstance(last, ChannelStep):
            return self.fit(moments, layer.in_features, name)
        made = CrossQuantStep(layer.in_features, self.bits, self.alpha, folded=True)
        made.channel.copy_(last.scale)
        return made


def channel_factor(absmax: Tensor, alpha: float) -> Tensor:
    """`[in]` c^(1-α), the channels' part of the steps."""
    return absmax.clamp(min=SMALLEST) ** (1 - alpha)


class CrossQuantStep(InputStep):
    """See `CrossQuant`. channel: `[in]` fp32 c^(1-α). folded: inputs are divided by it already, and so are outputs."""

    kind = "crossquant"
    channel: Tensor

    def __init__(self, width: int, bits: int = 8, alpha: float = 0.15, folded: bool = False) -> None:
        super().__init__(width)
        self.bits, self.alpha, self.folded = bits, alpha, folded
        self.register_buffer("channel", torch.ones(width))

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "alpha": self.alpha, "folded": self.folded}

    def forward(self, inputs: Tensor) -> Tensor:
        x, top = inputs.float(), 2 ** (self.bits - 1) - 1
        plain = x * self.channel if self.folded else x
        token = plain.abs().amax(-1, keepdim=True) ** self.alpha if inputs.numel() else x
        step = unless_zero((token if self.folded else token * self.channel) / top)
        return torch.round(x / step).clamp_(-top, top).mul_(step).to(inputs.dtype)


def kernel_proportion(step: InputStep, inputs: Tensor) -> float:
    """Share of the inputs that a step rounds to 0: the paper's quantization kernel."""
    return float((step(inputs) == 0).float().mean())


@dataclass(frozen=True)
class KernelOnly(Activations):
    """Zeroes what a symmetric step per token would round to 0, and leaves everything else as it is: how much of the
    loss of per-token rounding is that alone (the probe of card 140).
    """

    def __post_init__(self) -> None:
        check_bits(self.bits)

    def fit(self, moments: InputMoments | None, width: int, name: str) -> KernelOnlyStep:
        return KernelOnlyStep(width, self.bits)


class KernelOnlyStep(InputStep):
    """See `KernelOnly`."""

    kind = "kernel-only"

    def __init__(self, width: int, bits: int = 8) -> None:
        super().__init__(width)
        self.bits = bits

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits}

    def forward(self, inputs: Tensor) -> Tensor:
        if not inputs.numel():
            return inputs
        step = inputs.float().abs().amax(-1, keepdim=True) / (2 ** (self.bits - 1) - 1)
        return torch.where(torch.round(inputs.float() / unless_zero(step)) == 0, 0.0, inputs)
