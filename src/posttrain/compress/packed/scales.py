"""Scales of groups as they are stored: in full, as powers of two, in eight bits, or as codes of codes."""

from __future__ import annotations

import functools
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from posttrain.compress.kernels.table import PEAK, SMALLEST, GroupScales
from posttrain.trajectory import PosttrainError

Kind = Literal["float", "half", "power", "float8", "double"]
BLOCK = PEAK  # scales that share a scale of their own, of `double`
LARGEST = 448.0  # of E4M3
LEAST = 2.0**-9  # the smallest positive number of E4M3
TINY = SMALLEST  # below any scale of weights, so that nothing is divided by 0
BIAS = 127  # of E8M0


class Scales(nn.Module):
    """`[rows, groups]` positive scales.

    kind: `float` is fp32 and `half` fp16; `power` is an exponent of two in 8 bits (E8M0); `float8` an E4M3 number times
    one fp32 number of the matrix; `double` an 8-bit code of the scale's distance from the matrix's mean scale, with an
    fp32 scale for every 256 rows of a group. codes: `[rows, groups]`. whole: `[1]` fp32, the number of the matrix.
    peaks: `[ceil(rows / 256), groups]` fp32, of `double`.
    """

    codes: Tensor
    whole: Tensor | None
    peaks: Tensor | None

    def __init__(self, rows: int, groups: int, kind: Kind) -> None:
        super().__init__()
        if kind not in get_args(Kind):
            raise PosttrainError(f"scales are {kind!r}; expected one of {', '.join(get_args(Kind))}")
        self.rows, self.groups, self.kind = rows, groups, kind
        dtype = {"float": torch.float32, "half": torch.float16}.get(kind, torch.uint8)
        peaks = torch.zeros(-(-rows // BLOCK), groups) if kind == "double" else None
        self.register_buffer("codes", torch.zeros(rows, groups, dtype=dtype))
        self.register_buffer("whole", torch.zeros(1) if kind in ("float8", "double") else None)
        self.register_buffer("peaks", peaks)

    @classmethod
    def of(cls, scale: Tensor, kind: Kind, whole: float = 0.0) -> Scales:
        """From `[rows, groups]` fp32. whole: see `whole_of`. The columns do not depend on one another."""
        made = cls(scale.shape[0], scale.shape[1], kind)
        if kind in ("float", "half"):
            made.codes.copy_(scale)
        elif kind == "power":
            made.codes.copy_((torch.frexp(scale).exponent - 1 + BIAS).clamp(0, 2 * BIAS))
        elif kind == "float8":
            assert made.whole is not None
            made.whole.fill_(whole)
            held = (scale / made.whole).clamp(LEAST, LARGEST).to(torch.float8_e4m3fn)
            made.codes.copy_(held.view(torch.uint8))
        else:
            assert made.whole is not None
            assert made.peaks is not None
            made.whole.fill_(whole)
            away = scale - made.whole
            made.peaks.copy_(torch.stack([block.abs().amax(0) for block in away.split(BLOCK)]).clamp(min=TINY))
            made.codes.copy_(nearest_dynamic(away / made._by_row(made.peaks)))
        return made

    def values(self) -> Tensor:
        """`[rows, groups]` fp32."""
        if self.kind in ("float", "half"):
            found = self.codes.float()
        elif self.kind == "power":
            found = torch.exp2(self.codes.float() - BIAS)
        elif self.kind == "float8":
            assert self.whole is not None
            found = self.codes.view(torch.float8_e4m3fn).float() * self.whole
        else:
            assert self.whole is not None
            assert self.peaks is not None
            found = dynamic_map().to(self.codes.device)[self.codes.long()] * self._by_row(self.peaks) + self.whole
        return found.clamp(min=TINY)

    def for_kernel(self) -> GroupScales:
        """The same as a kernel reads them: in full, or bytes with a table."""
        if self.kind in ("float", "half"):
            return GroupScales(self.codes)
        if self.codes.is_cuda:  # tables are on the CPU, and reading `whole` would wait for the device
            return GroupScales(self.values())
        whole = 0.0 if self.whole is None else float(self.whole)
        if self.kind == "double":
            return GroupScales(self.codes, dynamic_map(), self.peaks, whole)
        return GroupScales(self.codes, _powers() if self.kind == "power" else (_eighths() * whole).clamp(min=TINY))

    def _by_row(self, blocks: Tensor) -> Tensor:
        return blocks.repeat_interleave(BLOCK, 0)[: self.rows]

    @property
    def counted_bits(self) -> float:
        single = {"float": 32, "half": 16}.get(self.kind, 8)
        whole = 32 if self.kind in ("float8", "double") else 0
        peaks = 32 * -(-self.rows // BLOCK) * self.groups if self.kind == "double" else 0
        return self.rows * self.groups * single + whole + peaks


def whole_of(scale: Tensor, kind: Kind) -> float:
    """The number that the scales of a matrix share: of `float8` what makes the largest 448, of `double` their mean."""
    if kind == "float8":
        return max(float(scale.max()) / LARGEST, TINY)
    return float(scale.mean()) if kind == "double" else 0.0


@functools.cache
def dynamic_map() -> Tensor:
    """`[256]` fp32 ascending: 0, 1, and in either sign, for i from 0 to 6, 2^i numbers evenly in [0.1, 1] 10^(i-6).

    Dynamic tree quantization, 8-bit Optimizers via Block-wise Quantization, 2021, arXiv 2110.02861.
    """
    sizes = [10.0 ** (i - 6) * (0.1 + 0.9 * (k + 0.5) / 2**i) for i in range(7) for k in range(2**i)]
    return torch.tensor(sorted([0.0, 1.0, *sizes, *(-s for s in sizes)]), dtype=torch.float64).float()


@functools.cache
def _powers() -> Tensor:
    """`[256]` fp32: what the exponents of E8M0 stand for."""
    return torch.exp2(torch.arange(256.0) - BIAS).clamp(min=TINY)


@functools.cache
def _eighths() -> Tensor:
    """`[256]` fp32: what the bytes of E4M3 stand for."""
    return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def nearest_dynamic(numbers: Tensor) -> Tensor:
    """Codes of the nearest numbers of the dynamic map."""
    table = dynamic_map().to(numbers.device)
    return torch.bucketize(numbers, (table[1:] + table[:-1]) / 2)
