"""Evenly spaced values of small groups, whose scales and zero points are rounded too, a block of rows together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.compress.grids.grid import Grid, Levels
from posttrain.compress.packed.bilevel import BilevelWeight
from posttrain.trajectory import PosttrainError

SMALLEST = 6e-8  # that half precision holds


@dataclass(frozen=True)
class Seconds:
    """Numbers of rows as codes of few bits. codes, values: `[rows, 1]`; low, step: `[blocks, 1]`, as stored."""

    codes: Tensor
    low: Tensor
    step: Tensor
    values: Tensor


@dataclass(frozen=True)
class BilevelLevels(Levels):
    """scale, zero: `[rows, 1]` as they are stored; values are scale * (code - zero) with a zero that is no integer."""

    scale: Tensor
    zero: Tensor
    top: int
    seconds: tuple[Seconds, Seconds]

    def nearest(self, weight: Tensor) -> Tensor:
        return torch.round(weight / self.scale + self.zero).clamp_(0, self.top).long()

    def values(self, codes: Tensor) -> Tensor:
        return (codes - self.zero) * self.scale


@dataclass(frozen=True)
class Bilevel(Grid):
    r"""`w = s (q - z)` with s and z of `second` bits each, on a range of their own for every `block` rows of a group.

    The range holds 0, as GPTQ's does. Bits a weight: b + 2 second / g + 64 / (g block).

    Reference: SpQR, 2023, arXiv 2306.03078 (card 000, section 6).
    """

    bits: int = 3
    group: int = 16
    second: int = 3
    block: int = 16

    def __post_init__(self) -> None:
        for name, bits in (("bits", self.bits), ("bits of scales and zeros", self.second)):
            if not 1 <= bits <= 8:
                raise PosttrainError(f"{name} is {bits}; expected 1 to 8")

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> BilevelLevels:
        low, high = weight.amin(1, keepdim=True).clamp(max=0.0), weight.amax(1, keepdim=True).clamp(min=0.0)
        top = 2**self.bits - 1
        scale = self._seconds(((high - low) / top).clamp(min=SMALLEST))
        zero = self._seconds((-low / scale.values).clamp(max=top))
        return BilevelLevels(scale.values, zero.values, top, (scale, zero))

    def _seconds(self, numbers: Tensor) -> Seconds:
        """`[rows, 1]` numbers on a grid of their own for each block of rows."""
        rows, top = len(numbers), 2**self.second - 1
        blocks = numbers.split(self.block)
        low = torch.stack([block.amin(0) for block in blocks]).clamp(max=65504.0).half().float()
        low = torch.where(numbers.amin() > 0, low.clamp(min=SMALLEST), low)
        high = torch.stack([block.amax(0) for block in blocks])
        step = ((high - low) / top).clamp(0.0, 65504.0).half().float()
        lows, steps = (each.repeat_interleave(self.block, 0)[:rows] for each in (low, step))
        codes = torch.round((numbers - lows) / torch.where(steps > 0, steps, torch.ones_like(steps))).clamp(0, top)
        return Seconds(codes.long(), low, step, lows + steps * codes)

    def pack(self, codes: Tensor, levels: Sequence[Levels], group_of: Tensor | None = None) -> BilevelWeight:
        if group_of is not None:
            raise PosttrainError("groups of 16 are runs of columns; expected static groups, or an order of columns")
        return self.pack_ordered(codes, levels, None)

    def pack_ordered(self, codes: Tensor, levels: Sequence[Levels], order: Tensor | None) -> BilevelWeight:
        """Codes whose columns stand in another order. order: `[columns]`, the place in the matrix of each."""
        found = [each for each in levels if isinstance(each, BilevelLevels)]
        both = [[each.seconds[which] for each in found] for which in (0, 1)]
        seconds = torch.stack([torch.cat([s.codes for s in which], 1) for which in both])
        tables = torch.stack(
            [torch.stack([torch.cat([getattr(s, n) for s in which], 1) for n in ("low", "step")]) for which in both]
        )
        return BilevelWeight.of(codes, seconds, tables, self.bits, self.second, self.block, order)
