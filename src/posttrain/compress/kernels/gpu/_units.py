"""Units of packed codes: whole words or a few bytes with whole codes in them, unpacked by shifts that are known."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CODES = 1024  # of a row, that a program goes through at a time
ROWS = 4  # of the matrix, of a program
WARPS = 4


@dataclass(frozen=True)
class Units:
    """How the rows of a matrix of codes are read. codes: int32 words or the bytes themselves. bytes: of a unit, 4 in a
    word, of which there is one. codes_each: codes a unit. stride: words or bytes a row. wide: units at a time.
    """

    codes: Tensor
    bytes: int
    codes_each: int
    stride: int
    wide: int


def units_of(codes: Tensor, bits: int, columns: int, groups: int) -> Units | None:
    """The units of `[rows, bytes]` packed codes, or None where a unit would lie in two groups, or be no whole one."""
    if 32 % bits == 0 and codes.shape[1] % 4 == 0 and codes.storage_offset() % 4 == 0 and codes.is_contiguous():
        size, each, words = 4, 32 // bits, codes.view(torch.int32)
    elif 8 % bits == 0:
        size, each, words = 1, 8 // bits, codes
    elif bits in (3, 6):
        size, each, words = 3, 24 // bits, codes
    else:
        return None
    group = columns // groups
    if columns % each or group % each:
        return None
    wide = triton.next_power_of_2(min(CODES // each, max(1, columns // each)))
    return Units(words, size, each, words.shape[1], wide)


@triton.jit
def unit(row, index, there, size: tl.constexpr):
    """Unit number `index` of rows of packed bytes as int32; row: pointers to its first word or byte."""
    if size == 3:
        place = row + index * 3
        found = tl.load(place, mask=there, other=0).to(tl.int32)
        found = found | (tl.load(place + 1, mask=there, other=0).to(tl.int32) << 8)
        found = found | (tl.load(place + 2, mask=there, other=0).to(tl.int32) << 16)
    else:
        found = tl.load(row + index, mask=there, other=0).to(tl.int32)
    return found
