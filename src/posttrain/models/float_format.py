"""Floating-point numbers of fewer bits, made in wider ones: rounding to a format, exact to the bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from posttrain.trajectory import PosttrainError

Rounding = Literal["nearest", "truncate"]
Reserved = Literal["infinity", "nan", "nothing"]
Beyond = Literal["infinity", "largest"]

# of a wide dtype: integers of its size, its exponent's bits, its mantissa's length, its exponent's bias
_LAYOUTS: dict[torch.dtype, tuple[torch.dtype, int, int, int]] = {
    torch.float32: (torch.int32, 0x7F80_0000, 23, 127),
    torch.float64: (torch.int64, 0x7FF0_0000_0000_0000, 52, 1023),
}


@dataclass(frozen=True)
class FloatFormat:
    """A sign, `exponent` bits and `mantissa` bits: `±1.m 2^e`, and `±0.m 2^e` at the smallest exponent.

    rounding: to the nearest number, ties to the even one; or towards 0, which drops the bits that have no room.
    subnormals: whether there are numbers below the smallest normal one, 2^(2 - 2^(exponent - 1)); else what is smaller
        becomes 0.
    reserved: what the highest exponent is kept for: `infinity` and NaN (IEEE 754), a single `nan` (E4M3 of OCP, whose
        largest number is 448), or `nothing` (E2M1).
    beyond: what becomes of numbers that are too large: infinite (NaN in a format without infinity), or the `largest`.
        What is infinite or NaN already stays.
    """

    exponent: int
    mantissa: int
    rounding: Rounding = "nearest"
    subnormals: bool = True
    reserved: Reserved = "infinity"
    beyond: Beyond = "infinity"

    def __post_init__(self) -> None:
        if not (2 <= self.exponent <= 8 and 1 <= self.mantissa <= 23):
            raise PosttrainError(
                f"a format of {self.exponent} exponent and {self.mantissa} mantissa bits; expected 2 to 8 and 1 to 23"
            )
        if self.exponent == 8 and self.reserved != "infinity":
            raise PosttrainError(f"8 exponent bits with {self.reserved} reserved go beyond fp32; expected infinity")
        for name, value, known in (
            ("rounding", self.rounding, ("nearest", "truncate")),
            ("reserved", self.reserved, ("infinity", "nan", "nothing")),
            ("beyond", self.beyond, ("infinity", "largest")),
        ):
            if value not in known:
                raise PosttrainError(f"{name} is {value!r}; expected {' or '.join(known)}")

    @property
    def least_exponent(self) -> int:
        """Of the smallest normal number."""
        return 2 - 2 ** (self.exponent - 1)

    @property
    def largest(self) -> float:
        """The largest finite number."""
        top = 2 ** (self.exponent - 1) - (self.reserved == "infinity")
        lacking = 2.0 ** (1 - self.mantissa) if self.reserved == "nan" else 2.0**-self.mantissa
        return (2 - lacking) * 2.0**top

    def __call__(self, numbers: Tensor) -> Tensor:
        """The same numbers, rounded to the format, in the dtype that they came in. No gradient goes through."""
        wide = numbers.detach()
        if wide.dtype not in _LAYOUTS:
            wide = wide.float()
        integers, mask, length, bias = _LAYOUTS[wide.dtype]
        if self.rounding == "truncate" and (
            not self.subnormals or (self.exponent == 8 and wide.dtype is torch.float32)
        ):
            # no number's neighbours are further apart than its own exponent says: bits without room are cut off
            found = (wide.view(integers) & (-1 << (length - self.mantissa))).view(wide.dtype)
            if self.subnormals:  # of as many exponents as fp32 has: nothing is too small or too large
                return torch.where(wide.isnan(), wide, found).to(numbers.dtype)
        else:
            # the power of two below each number, and with it the distance of its neighbours in the format
            least = (self.least_exponent + bias) << length
            power = (wide.view(integers) & mask).clamp_(min=least).view(wide.dtype)
            step = power * 2.0**-self.mantissa
            found = wide / step
            found = found.round_() if self.rounding == "nearest" else found.trunc_()
            found *= step
        if not self.subnormals:
            found = torch.where(wide.abs() < 2.0**self.least_exponent, wide * 0.0, found)
        found = self._bounded(found)
        finite = wide.isfinite()
        if self.reserved != "infinity" and self.beyond == "infinity":  # there is no infinity to stay
            finite |= wide.isinf()
            found = torch.where(wide.isinf(), torch.nan, found)
        return torch.where(finite, found, wide).to(numbers.dtype)

    def _bounded(self, numbers: Tensor) -> Tensor:
        if self.beyond == "largest":
            return numbers.clamp_(-self.largest, self.largest)
        outside = torch.nan if self.reserved != "infinity" else torch.inf
        return torch.where(numbers.abs() > self.largest, torch.copysign(torch.full_like(numbers, outside), numbers),
                           numbers)  # fmt: skip


BFLOAT16 = FloatFormat(8, 7)
FLOAT16 = FloatFormat(5, 10)
E5M2 = FloatFormat(5, 2)
E4M3 = FloatFormat(4, 3, reserved="nan")
