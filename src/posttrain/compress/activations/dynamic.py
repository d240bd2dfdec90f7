"""Activations rounded by the range of what is there: of each token, or of all that comes together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from posttrain.compress.activations.quantizer import Activations
from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.inputs import InputStep
from posttrain.trajectory import PosttrainError

Per = Literal["token", "tensor"]


def symmetric(x: Tensor, most: Tensor, bits: int) -> Tensor:
    """The nearest of `s q`, q from -2^(b-1) to 2^(b-1) - 1, with s = most / (2^(b-1) - 1)."""
    top = 2 ** (bits - 1) - 1
    scale = unless_zero(most / top)
    return torch.round(x / scale).clamp_(-top - 1, top).mul_(scale)


def asymmetric(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """The nearest of `s (q - z)`, q from 0 to 2^b - 1, over the range from low to high extended to hold 0."""
    scale, zero = scale_and_zero(low, high, bits)
    return (torch.round(x / scale) + zero).clamp_(0, 2**bits - 1).sub_(zero).mul_(scale)


def scale_and_zero(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and integer zero point of a range that is extended to hold 0."""
    low, high, top = low.clamp(max=0), high.clamp(min=0), 2**bits - 1
    scale = unless_zero((high - low) / top)
    return scale, torch.round(-low / scale).clamp(0, top)


def unless_zero(scale: Tensor) -> Tensor:
    """A scale, of constant zeros 1."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def check_bits(bits: int) -> None:
    if not 2 <= bits <= 16:
        raise PosttrainError(f"activations of {bits} bits; expected 2 to 16")


@dataclass(frozen=True)
class Dynamic(Activations):
    """Ranges are taken from the inputs themselves when the model runs; no data is needed before.

    symmetric: around 0, with codes down to -2^(b-1); otherwise from the smallest to the largest, 0 included.
    per: `token` has a range for each token; `tensor` one for all tokens that run together, so that what a token is
        rounded to depends on its company (SmoothQuant's O2).
    clip: share of the range that is kept; what lies beyond is cut off (QuaRot takes 0.9).
    group: channels of a token that share a range, 0 for all of them.

    Reference: card 000, section 1.
    """

    symmetric: bool = True
    per: Per = "token"
    clip: float = 1.0
    group: int = 0

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.per not in ("token", "tensor"):
            raise PosttrainError(f"per is {self.per!r}; expected token or tensor")
        if not 0 < self.clip <= 1:
            raise PosttrainError(f"clip is {self.clip}; expected a share of the range, above 0 and up to 1")
        if self.group and self.per == "tensor":
            raise PosttrainError(
                f"groups of {self.group} channels are of single tokens; expected per token, or group 0"
            )

    def fit(self, moments: InputMoments | None, width: int, name: str) -> DynamicStep:
        if self.group and width % self.group:
            raise PosttrainError(f"groups of {self.group} channels do not divide the {width} inputs of {name}")
        return DynamicStep(width, self.bits, self.symmetric, self.per, self.clip, self.group)


class DynamicStep(InputStep):
    """See `Dynamic`."""

    kind = "dynamic"

    def __init__(
        self, width: int, bits: int = 8, symmetric: bool = True, per: Per = "token", clip: float = 1.0, group: int = 0
    ) -> None:
        super().__init__(width)
        self.bits, self.symmetric, self.per, self.clip, self.group = bits, symmetric, per, clip, group

    def settings(self) -> dict[str, Any]:
        return {
            "bits": self.bits, "symmetric": self.symmetric, "per": self.per, "clip": self.clip, "group": self.group
        }  # fmt: skip

    def forward(self, inputs: Tensor) -> Tensor:
        if not inputs.numel():
            return inputs
        x = inputs.float()
        if self.group:
            x = x.unflatten(-1, (-1, self.group))
        over = (-1,) if self.per == "token" else tuple(range(x.ndim))
        if self.symmetric:
            rounded = symmetric(x, self.clip * x.abs().amax(over, keepdim=True), self.bits)
        else:
            low, high = x.amin(over, keepdim=True), x.amax(over, keepdim=True)
            rounded = asymmetric(x, self.clip * low, self.clip * high, self.bits)
        return rounded.reshape(inputs.shape).to(inputs.dtype)
