"""Levels that fall by a factor: powers of two, or of its root, below a largest value. For attention probabilities."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.compress.grids.grid import Levels


@dataclass(frozen=True)
class LogLevels(Levels):
    """`δ 2^(-q/k)` for codes q from 0 to 2^b - 1, and 0 for everything that is nearer to a further one.

    scale: δ, a number. root: k = 2, steps of the root of two; else k = 1. The zero is one value more than b bits have
    codes for: those who compute with this grid leave such entries out.

    Reference: RepQ-ViT, 2022, arXiv 2212.08254 (card 029).
    """

    scale: Tensor
    bits: int
    root: bool = True

    @property
    def nothing(self) -> int:
        """The code of 0."""
        return int(2**self.bits)

    def nearest(self, weight: Tensor) -> Tensor:
        """Codes by the nearest logarithm, of numbers from 0 on."""
        steps = torch.round(-(2 if self.root else 1) * torch.log2(weight / self.scale))  # infinite for 0
        return steps.clamp(0, self.nothing).to(torch.int64)

    def values(self, codes: Tensor) -> Tensor:
        found = self.scale * torch.exp2(-codes / (2 if self.root else 1))
        return torch.where(codes >= self.nothing, torch.zeros_like(found), found)

    def shifted(self, codes: Tensor) -> Tensor:
        """The same values as a kernel of base 2 computes them: a shift by ⌈q/2⌉ and, for odd q, a scale that is √2 as
        large, `δ (1 + (√2 - 1) [q odd]) 2^(-⌈q/2⌉)`.
        """
        if not self.root:
            return self.values(codes)
        scale = self.scale * (1 + (math.sqrt(2) - 1) * (codes % 2))
        found = torch.ldexp(scale, -((codes + 1) // 2))
        return torch.where(codes >= self.nothing, torch.zeros_like(found), found)
