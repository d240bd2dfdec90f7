"""Uniform grids: evenly spaced values, symmetric or not, with an integer or a float zero point."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from posttrain.compress.grids.grid import Grid, Levels
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.trajectory import PosttrainError

Zero = Literal["none", "integer", "float"]
STEPS, SHRINK, POWER = 80, 0.8, 2.4  # of the search of the range: shares 1 - i/80 down to 0.2, errors to the power 2.4
SMALLEST = 6e-8  # the smallest scale that half precision holds


@dataclass(frozen=True)
class UniformLevels(Levels):
    """scale, zero: `[rows, 1]`; an integer zero is the code of the value 0, a float one the smallest value.

    Values are scale * (code - zero), or scale * code + zero where the zero is a float.
    """

    scale: Tensor
    zero: Tensor
    top: int
    float_zero: bool = False

    def nearest(self, weight: Tensor) -> Tensor:
        return self._nearest(weight).to(torch.int64)

    def rounded(self, weight: Tensor) -> Tensor:
        return self.values(self._nearest(weight))  # without integers, which take longer than all else here

    def _nearest(self, weight: Tensor) -> Tensor:
        """Codes as floats."""
        if self.float_zero:
            codes = (weight - self.zero).div_(self.scale).round_()
        else:
            codes = (weight / self.scale).round_().add_(self.zero)
        return codes.clamp_(0, self.top)

    def values(self, codes: Tensor) -> Tensor:
        return codes * self.scale + self.zero if self.float_zero else (codes - self.zero) * self.scale


@dataclass(frozen=True)
class Uniform(Grid):
    r"""Evenly spaced values.

    zero: `none` is symmetric, s = max|w| / ((2^b - 1)/2) and codes -2^(b-1)..2^(b-1)-1; `integer` extends the range to
        hold 0 and gives it a code; `float` starts at the smallest weight, whatever it is.
    clip: `mse` searches, row by row, the share of the range that loses least (errors to the power 2.4, as GPTQ does),
        `none` takes the whole range.

    Reference: card 000, section 1.
    """

    zero: Zero = "integer"
    clip: Literal["none", "mse"] = "none"

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise PosttrainError(f"bits is {self.bits}; a uniform grid has 1 to 8")
        if self.zero not in ("none", "integer", "float"):
            raise PosttrainError(f"zero is {self.zero!r}; expected none, integer or float")
        if self.clip not in ("none", "mse"):
            raise PosttrainError(f"clip is {self.clip!r}; expected none or mse")

    @property
    def top(self) -> int:
        return int(2**self.bits - 1)

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> UniformLevels:
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        if self.zero != "float":
            low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        best = self._levels(low, high)
        if self.clip == "none":
            return best
        weights = 1.0 if importance is None else importance
        least = ((best.rounded(weight) - weight).abs() ** POWER * weights).sum(1, keepdim=True)
        for i in range(1, int(STEPS * SHRINK)):
            share = 1 - i / STEPS
            tried = self._levels(share * low, share * high)
            error = ((tried.rounded(weight) - weight).abs() ** POWER * weights).sum(1, keepdim=True)
            better = error < least
            least = torch.where(better, error, least)
            best = UniformLevels(
                torch.where(better, tried.scale, best.scale),
                torch.where(better, tried.zero, best.zero),
                self.top,
                best.float_zero,
            )
        return best

    def _levels(self, low: Tensor, high: Tensor) -> UniformLevels:
        """Levels between two ends, `[rows, 1]` each, with scales as half precision holds them."""
        if self.zero == "none":
            scale = _half(2 * torch.maximum(-low, high) / self.top)
            return UniformLevels(scale, torch.full_like(scale, float((self.top + 1) // 2)), self.top)
        scale = _half((high - low) / self.top)
        if self.zero == "float":
            return UniformLevels(scale, low.half().float(), self.top, float_zero=True)
        return UniformLevels(scale, torch.round(-low / scale).clamp_(0, self.top), self.top)

    def pack(self, codes: Tensor, levels: Sequence[Levels], group_of: Tensor | None = None) -> UniformWeight:
        found = [each for each in levels if isinstance(each, UniformLevels)]
        scale, zero = torch.cat([f.scale for f in found], 1), torch.cat([f.zero for f in found], 1)
        return UniformWeight.of(codes, scale, zero, int(self.bits), self.zero, group_of)


def _half(scale: Tensor) -> Tensor:
    """A scale as it is stored; of constant zeros, one that keeps them zero."""
    held = scale.clamp(max=65504.0).half().float()
    return torch.where(held < SMALLEST, torch.ones_like(held), held)
