"""Activations rounded inside ranges that calibration found: one for every channel, or for every place of a sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.compress.activations.dynamic import check_bits
from posttrain.compress.activations.quantizer import Activations
from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.inputs import InputStep
from posttrain.trajectory import PosttrainError

NARROWEST = 1e-5  # of a range: a channel that never changes keeps its value


@dataclass(frozen=True)
class ChannelRanges(Activations):
    """A range for every input channel of a layer, from its smallest to its largest calibration input; it never moves.

    Scales by channel stand inside the sum of a matrix product, so integer kernels cannot take them out of it.
    """

    bits: int = 4

    def __post_init__(self) -> None:
        check_bits(self.bits)

    @property
    def uses_data(self) -> bool:
        return True

    def fit(self, moments: InputMoments | None, width: int, name: str) -> RangeStep:
        if moments is None or not moments.count:
            raise PosttrainError(f"{name} met no calibration token, so its inputs have no range; give more text")
        return RangeStep.of(moments.minimum, moments.maximum, self.bits)


class RangeStep(InputStep):
    r"""`x̂ = (clamp(round(σx - ζ), -2^(b-1), 2^(b-1) - 1) + ζ)/σ`, `σ = (2^b - 1)/(u - l)`, `ζ = round(σl) + 2^(b-1)`.

    low, high: fp32 `[in]`, or `[positions, 1]` where a range belongs to a place of the sequence; then all sequences
    have that length (as the patches of an image do).
    """

    kind = "ranges"
    low: Tensor
    high: Tensor

    def __init__(self, width: int, bits: int = 4, positions: int = 0) -> None:
        super().__init__(width)
        self.bits, self.positions = bits, positions
        shape = (positions, 1) if positions else (self.width,)
        self.register_buffer("low", torch.zeros(shape))
        self.register_buffer("high", torch.zeros(shape))

    @classmethod
    def of(cls, low: Tensor, high: Tensor, bits: int) -> RangeStep:
        """A range for each of `[in]` channels."""
        return cls(len(low), bits).moved(low, high)

    @classmethod
    def of_positions(cls, low: Tensor, high: Tensor, width: int, bits: int) -> RangeStep:
        """A range for each of `[positions]` places."""
        return cls(width, bits, len(low)).moved(low[:, None], high[:, None])

    def moved(self, low: Tensor, high: Tensor) -> RangeStep:
        """The same step with its ranges moved, in place."""
        self.low.copy_(low)
        self.high.copy_(high)
        return self

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "positions": self.positions}

    def forward(self, inputs: Tensor) -> Tensor:
        if self.positions and (inputs.ndim < 2 or inputs.shape[-2] != self.positions):
            raise PosttrainError(
                f"inputs of shape {tuple(inputs.shape)}; expected the {self.positions} places of an image of the size "
                f"that the ranges were calibrated on"
            )
        half = 2 ** (self.bits - 1)
        scale = (2**self.bits - 1) / (self.high - self.low).clamp(min=NARROWEST)
        shift = torch.round(scale * self.low) + half
        codes = torch.round(scale * inputs.float() - shift).clamp_(-half, half - 1)
        return ((codes + shift) / scale).to(inputs.dtype)
