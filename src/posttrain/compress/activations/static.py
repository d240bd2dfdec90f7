"""Activations rounded by a range that calibration found: one scale a layer, known before the model runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.compress.activations.dynamic import check_bits, scale_and_zero, unless_zero
from posttrain.compress.activations.quantizer import Activations
from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.inputs import InputStep
from posttrain.trajectory import PosttrainError


@dataclass(frozen=True)
class Static(Activations):
    """One range for all inputs of a layer (SmoothQuant's O3); what lies beyond it later is cut off.

    symmetric: around 0, with codes down to -2^(b-1); otherwise from the smallest to the largest, 0 included.
    quantile: 1 takes the smallest and largest input of the calibration; less takes that quantile of the tokens' own
        largest (and smallest) inputs, over the tokens that were kept, so that a few outlying tokens do not stretch it.

    Reference: card 000, section 4; token quantiles: card 145.
    """

    symmetric: bool = True
    quantile: float = 1.0

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if not 0 < self.quantile <= 1:
            raise PosttrainError(f"quantile is {self.quantile}; expected a share of tokens, above 0 and up to 1")

    @property
    def uses_data(self) -> bool:
        return True

    def fit(self, moments: InputMoments | None, width: int, name: str) -> StaticStep:
        if moments is None or not moments.count:
            raise PosttrainError(f"{name} met no calibration token, so its inputs have no range; skip it or give more")
        low, high = moments.minimum.min(), moments.maximum.max()
        if self.quantile < 1:
            low = moments.kept.amin(1).quantile(1 - self.quantile)
            high = moments.kept.amax(1).quantile(self.quantile)
        if not self.symmetric:
            return StaticStep.of(width, self.bits, *scale_and_zero(low, high, self.bits))
        return StaticStep.of(width, self.bits, symmetric_scale(torch.maximum(-low, high).clamp(min=0), self.bits))


def symmetric_scale(most: Tensor, bits: int) -> Tensor:
    """The scale with which the largest code stands for `most`; of constant zeros 1."""
    return unless_zero(most / (2 ** (bits - 1) - 1))


class StaticStep(InputStep):
    """See `Static`. scale, zero: fp32 numbers, or `[in]` with `channels`, one for each; of a symmetric step the zero is
    0 and codes are signed.
    """

    kind = "static"
    scale: Tensor
    zero: Tensor

    def __init__(self, width: int, bits: int = 8, symmetric: bool = True, channels: bool = False) -> None:
        super().__init__(width)
        self.bits, self.symmetric, self.channels = bits, symmetric, channels
        shape = (self.width,) if channels else ()
        self.register_buffer("scale", torch.ones(shape))
        self.register_buffer("zero", torch.zeros(shape))

    @classmethod
    def of(cls, width: int, bits: int, scale: Tensor, zero: Tensor | None = None) -> StaticStep:
        """One with that scale and zero; without a zero it is symmetric."""
        made = cls(width, bits, zero is None, scale.ndim > 0)
        made.scale.copy_(scale)
        if zero is not None:
            made.zero.copy_(zero)
        return made

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "symmetric": self.symmetric, "channels": self.channels}

    def forward(self, inputs: Tensor) -> Tensor:
        least = -(2 ** (self.bits - 1)) if self.symmetric else 0
        codes = (torch.round(inputs.float() / self.scale) + self.zero).clamp_(least, least + 2**self.bits - 1)
        return codes.sub_(self.zero).mul_(self.scale).to(inputs.dtype)
