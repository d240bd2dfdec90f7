"""Static ranges between quantiles of the calibration inputs, those of a few that lose least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from posttrain.compress.activations.dynamic import check_bits
from posttrain.compress.activations.quantizer import Activations
from posttrain.compress.activations.static import StaticStep
from posttrain.compress.moments import InputMoments
from posttrain.trajectory import PosttrainError

QUANTILES = (0.999, 0.9999, 0.99999)
Range = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Percentile(Activations):
    """A range from the (1 - p)- to the p-quantile of the inputs, with the p of `quantiles` that loses least of them.

    What is lost is the squared error of a sample of tokens. Ranges need not hold 0; zero points are whole numbers.
    per: `tensor` has one range a layer, `channel` one for every input channel (which stands inside the sum of a matrix
    product, so that an integer kernel cannot take it out).

    Reference: RepQ-ViT, 2022, arXiv 2212.08254 (cards 029 and 000).
    """

    bits: int = 4
    quantiles: tuple[float, ...] = QUANTILES
    per: Literal["tensor", "channel"] = "tensor"

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_quantiles(self.quantiles)
        if self.per not in ("tensor", "channel"):
            raise PosttrainError(f"per is {self.per!r}; expected tensor or channel")

    @property
    def uses_data(self) -> bool:
        return True

    @property
    def keep(self) -> int:
        return 4096

    def fit(self, moments: InputMoments | None, width: int, name: str) -> StaticStep:
        kept = sample(moments, name)
        rows = kept.T if self.per == "channel" else kept.reshape(1, -1)
        scale, zero = affine(*least_ends(rows, self.bits, self.quantiles), self.bits)
        if self.per == "tensor":
            scale, zero = scale[0], zero[0]
        return StaticStep.of(width, self.bits, scale, zero)


def affine(low: Tensor, high: Tensor, bits: int) -> Range:
    """Scales and whole zero points of ranges as they are, `s = (u - l) / (2^b - 1)` and `z = round(-l / s)`.

    Zero points may lie beyond the codes. A range of one value has that value as its step, so that it is kept.
    """
    scale = (high - low) / (2**bits - 1)
    alone = torch.where(low != 0, low.abs(), torch.ones_like(low))
    scale = torch.where(scale > 0, scale, alone)
    return scale, torch.round(-low / scale)


def rounded(x: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """`s (clamp(round(x/s) + z, 0, 2^b - 1) - z)`."""
    return (torch.round(x / scale) + zero).clamp(0, 2**bits - 1).sub(zero).mul(scale)


def least_ends(rows: Tensor, bits: int, tried: Sequence[float] = QUANTILES) -> Range:
    """`[rows]` ends of ranges for `[rows, n]`: of each row the pair of quantiles with the least squared error."""
    ordered = rows.sort(-1).values
    low, high = ordered[:, 0], ordered[:, -1]
    least = torch.full_like(low, torch.inf)
    for p in tried:
        ends = quantile(ordered, 1 - p), quantile(ordered, p)
        scale, zero = affine(*ends, bits)
        error = (rounded(rows, scale[:, None], zero[:, None], bits) - rows).square().sum(-1)
        better = error < least
        least = torch.where(better, error, least)
        low, high = torch.where(better, ends[0], low), torch.where(better, ends[1], high)
    return low, high


def quantile(ordered: Tensor, p: float) -> Tensor:
    """`[...]` the p-quantile of `[..., n]` ascending values, between two of them in a straight line, of any n."""
    place = p * (ordered.shape[-1] - 1)
    below = min(int(place), ordered.shape[-1] - 2) if ordered.shape[-1] > 1 else 0
    above = min(below + 1, ordered.shape[-1] - 1)
    return ordered[..., below] + (place - below) * (ordered[..., above] - ordered[..., below])


def sample(moments: InputMoments | None, name: str) -> Tensor:
    """`[tokens, in]` kept inputs; PosttrainError where there is none."""
    if moments is None or not len(moments.kept):
        raise PosttrainError(f"{name} met no calibration token, so its inputs have no range; skip it or give more")
    return moments.kept


def check_quantiles(quantiles: Sequence[float]) -> None:
    if not quantiles or not all(0.5 < p <= 1 for p in quantiles):
        raise PosttrainError(f"quantiles are {list(quantiles)}; expected shares above a half and up to 1")
