"""Evenly spaced levels whose number is no power of two: codes are digits, several to a number of a few bits."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.compress.packed.bits import pack, packed_width
from posttrain.compress.packed.weight import PackedWeight


def digits_in(levels: int) -> tuple[int, int]:
    """How many digits of that base share a number, and its bits, at most 8: the fewest bits a digit, and of those the
    fewest digits. Five levels: 3 digits in 7 bits; three: 5 in 8.
    """
    fits = [(max(1, (levels**n - 1).bit_length()), n) for n in range(1, 9) if levels**n <= 256]
    if levels < 2 or not fits:
        raise ValueError(f"{levels} levels; expected 2 to 256")
    bits, count = min(fits, key=lambda fit: (fit[0] / fit[1], fit[1]))
    return count, bits


def pack_digits(codes: Tensor, levels: int) -> Tensor:
    """`[rows, columns]` codes below `levels` -> `[rows, bytes]` uint8; digit i of a number weighs levels**i."""
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= levels):
        raise ValueError(f"codes from {int(codes.min())} to {int(codes.max())} are no digits of base {levels}")
    count, bits = digits_in(levels)
    padded = F.pad(codes.to(torch.int64), (0, -codes.shape[1] % count)).unflatten(1, (-1, count))
    return pack((padded * levels ** torch.arange(count)).sum(-1), bits)


def unpack_digits(packed: Tensor, levels: int, columns: int) -> Tensor:
    """The inverse of `pack_digits`, as fp32. A number lies in two bytes; its digits are looked up."""
    count, bits = digits_in(levels)
    start = torch.arange(-(-columns // count), dtype=torch.int32, device=packed.device) * bits
    padded, byte = F.pad(packed, (0, 1)).to(torch.int32), start >> 3
    both = padded.index_select(1, byte) | padded.index_select(1, byte + 1) << 8
    numbers = (both >> (start & 7)) & ((1 << bits) - 1)
    found = _digits(levels).to(packed.device).index_select(0, numbers.flatten())
    return found.view(len(packed), -1)[:, :columns]


@functools.cache
def _digits(levels: int) -> Tensor:
    """`[2**bits, digits]` fp32: what each number stands for."""
    count, bits = digits_in(levels)
    return (torch.arange(1 << bits)[:, None] // levels ** torch.arange(count) % levels).float()


class LevelsWeight(PackedWeight):
    """`w = scale * (code - zero)`, or `scale * code + zero` with a float zero, of codes from 0 to levels - 1.

    codes: `[out, bytes]` uint8, see `pack_digits`. scale: `[out, groups]` fp16. zero: a code, packed like the codes, or
    `[out, groups]` fp16.
    """

    format = "levels"
    codes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, shape: tuple[int, int], levels: int, groups: int, float_zero: bool = False) -> None:
        super().__init__(shape)
        self.levels, self.groups, self.float_zero = levels, groups, float_zero
        rows, columns = self.shape
        count, bits = digits_in(levels)
        self.register_buffer("codes", torch.zeros(rows, packed_width(-(-columns // count), bits), dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(rows, groups, dtype=torch.float16))
        packed = torch.zeros(rows, packed_width(-(-groups // count), bits), dtype=torch.uint8)
        self.register_buffer("zero", torch.zeros(rows, groups, dtype=torch.float16) if float_zero else packed)

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, zero: Tensor, levels: int, float_zero: bool = False) -> LevelsWeight:
        """From `[out, in]` codes and `[out, groups]` scales and zeros."""
        made = cls((codes.shape[0], codes.shape[1]), levels, scale.shape[1], float_zero)
        made.codes.copy_(pack_digits(codes, levels))
        made.scale.copy_(scale)
        made.zero.copy_(zero if float_zero else pack_digits(zero, levels))
        return made

    @classmethod
    def empty(cls, shape: tuple[int, int], **settings: Any) -> LevelsWeight:
        return cls(shape, **settings)

    def settings(self) -> dict[str, Any]:
        return {"levels": self.levels, "groups": self.groups, "float_zero": self.float_zero}

    @property
    def counted_bits(self) -> float:
        count, bits = digits_in(self.levels)
        rows, columns = self.shape
        zeros = 16 * self.groups if self.float_zero else bits * -(-self.groups // count)
        return rows * (bits * -(-columns // count) + 16 * self.groups + zeros)

    def unpacked(self) -> Tensor:
        """`[out, in]` fp32 codes."""
        return unpack_digits(self.codes, self.levels, self.shape[1])

    def dequantize(self) -> Tensor:
        codes = self.unpacked().reshape(self.shape[0], self.groups, -1)
        scale = self.scale.float()[..., None]
        if self.float_zero:
            return (codes * scale + self.zero.float()[..., None]).reshape(self.shape)
        zero = unpack_digits(self.zero, self.levels, self.groups)
        return ((codes - zero[..., None]) * scale).reshape(self.shape)
