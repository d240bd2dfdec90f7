"""What a packed weight is to other programs: integer codes with a scale and a zero point a group, if it is that."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.compress.packed.bits import pack, unpack
from posttrain.compress.packed.levels import LevelsWeight, unpack_digits
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.packed.weight import PackedWeight


@dataclass(frozen=True)
class Integers:
    """`w = scale * (code - zero)`, or `scale * code + low` where the zero point is no integer. On the CPU.

    packed: `[out, ceil(in * bits / 8)]` uint8, the codes, lowest bits first. scale: `[out, groups]` fp16. zero: `[out,
    groups]` int32 codes, or None. low: `[out, groups]` fp16, or None. group_of: `[in]` int64, where groups are not runs
    of columns. symmetric: no zero points are stored, and each is the middle code.
    """

    shape: tuple[int, int]
    packed: Tensor
    scale: Tensor
    bits: int
    zero: Tensor | None = None
    low: Tensor | None = None
    group_of: Tensor | None = None
    symmetric: bool = False

    @property
    def codes(self) -> Tensor:
        """`[out, in]` uint8."""
        return unpack(self.packed, self.bits, self.shape[1])

    @property
    def groups(self) -> int:
        return self.scale.shape[1]

    @property
    def width(self) -> int:
        """Columns of a group."""
        return self.shape[1] // self.groups


def integers_of(weight: PackedWeight) -> Integers | None:
    """The codes of a packed weight as they are stored; None of a format that is no evenly spaced integers."""
    if isinstance(weight, UniformWeight):
        floating = weight.kind == "float"
        return Integers(
            weight.shape,
            weight.codes.cpu(),
            weight.scale.cpu(),
            weight.bits,
            zero=None if floating else weight.zeros().int().cpu(),
            low=weight.zero.cpu() if floating and weight.zero is not None else None,
            group_of=None if weight.group_of is None else weight.group_of.long().cpu(),
            symmetric=weight.kind == "none",
        )
    if isinstance(weight, LevelsWeight):  # digits of a base between powers of two: the same codes in whole bits
        bits, floating = (weight.levels - 1).bit_length(), weight.float_zero
        return Integers(
            weight.shape,
            pack(weight.unpacked().to(torch.uint8).cpu(), bits),
            weight.scale.cpu(),
            bits,
            zero=None if floating else unpack_digits(weight.zero, weight.levels, weight.groups).int().cpu(),
            low=weight.zero.cpu() if floating else None,
        )
    return None
