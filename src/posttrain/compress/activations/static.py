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
        made = StaticStep(width, self.bits, self.symmetric)
        if self.symmetric:
            made.scale.copy_(unless_zero(torch.maximum(-low, high).clamp(min=0) / (2 ** (self.bits - 1) - 1)))
        else:
            scale, zero = scale_and_zero(low, high, self.bits)
            made.scale.copy_(scale)
            made.zero.copy_(zero)
        return made


class StaticStep(InputStep):
    """See `Static`. scale, zero: fp32 numbers; of a symmetric step the zero is 0 and codes are signed."""

    kind = "static"
    scale: Tensor
    zero: Tensor

    def __init__(self, width: int, bits: int = 8, symmetric: bool = True) -> None:
        super().__init__(width)
        self.bits, self.symmetric = bits, symmetric
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("zero", torch.zeros(()))

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "symmetric": self.symmetric}

    def forward(self, inputs: Tensor) -> Tensor:
        least = -(2 ** (self.bits - 1)) if self.symmetric else 0
        codes = (torch.round(inputs.float() / self.scale) + self.zero).clamp_(least, least + 2**self.bits - 1)
        return codes.sub_(self.zero).mul_(self.scale).to(inputs.dtype)
