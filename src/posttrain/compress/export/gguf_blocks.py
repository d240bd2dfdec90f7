"""Integer codes as GGUF's blocks of 32 columns, with d and m fp16: Q4_0 `d (q - 8)`, Q4_1 `d q + m`, Q8_0 `d q`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from posttrain.compress.export.integers import Integers

BLOCK = 32


class Unfit(ValueError):
    """Why codes are no blocks of GGUF, and what would be: the end of a sentence that begins with the layer's name."""


@dataclass(frozen=True)
class Blocks:
    """kind: the name of the type. data: `[out, bytes]` uint8, or the values of a float type."""

    kind: str
    data: np.ndarray


def blocks_of(found: Integers, rows: Tensor | None = None) -> Blocks:
    """The codes as they are, with the scale of a group repeated for each of its blocks.

    Q4_0 where all codes lie within 8 of their zero point, else Q4_1, of up to 4 bits; Q8_0 of more. Codes and scales
    stay to the bit. The m of Q4_1 is a zero point that is a half-precision number already, or -scale * zero rounded to
    one, which is wrong by at most 2^-11 of itself. rows: `[out]` the row at each place, where it is another.

    Raises Unfit.
    """
    rows = torch.arange(found.shape[0]) if rows is None else rows
    _check_columns(found)
    scale = _by_block(found, found.scale)[rows]
    codes = found.codes[rows].int()
    if found.zero is None or found.low is not None:
        assert found.low is not None
        if found.bits > 4:
            raise Unfit(
                f"is stored in {found.bits} bits with float zero points; expected --bits 4 or less, or integer zero "
                f"points (zero: integer or none)"
            )
        return _with_low(codes, scale, _by_block(found, found.low)[rows])
    zero = _by_block(found, found.zero)[rows]
    signed = codes - zero.repeat_interleave(BLOCK, 1)
    if int(signed.min()) >= -8 and int(signed.max()) <= 7:
        return Blocks("Q4_0", np.concatenate([_halves(scale), _nibbles(signed + 8)], -1).reshape(len(rows), -1))
    if found.bits <= 4:
        return _with_low(codes, scale, (-scale.float() * zero.float()).half())
    if int(signed.min()) < -128 or int(signed.max()) > 127:
        raise Unfit(f"is stored in {found.bits} bits with zero points; expected --bits 7 or less, or zero: none")
    bytes_ = signed.to(torch.int8).reshape(-1, BLOCK).numpy().view(np.uint8)
    return Blocks("Q8_0", np.concatenate([_halves(scale), bytes_], -1).reshape(len(rows), -1))


def _check_columns(found: Integers) -> None:
    columns = found.shape[1]
    if columns % BLOCK:
        raise Unfit(f"has {columns} input columns; a block of GGUF has {BLOCK}, and columns must be a multiple of that")
    if found.group_of is not None:
        raise Unfit("has groups that are no runs of columns, as a block of GGUF is; expected static groups")
    if found.width % BLOCK:
        raise Unfit(
            f"has groups of {found.width} columns; a block of GGUF has {BLOCK}: expected --group {BLOCK} or a multiple "
            f"of it, or 0 for whole rows"
        )


def _with_low(codes: Tensor, scale: Tensor, low: Tensor) -> Blocks:
    if not torch.isfinite(low).all():
        raise Unfit("has a smallest value beyond half precision (65504), in which GGUF keeps it")
    parts = [_halves(scale), _halves(low), _nibbles(codes)]
    return Blocks("Q4_1", np.concatenate(parts, -1).reshape(len(codes), -1))


def _by_block(found: Integers, values: Tensor) -> Tensor:
    """`[out, groups]` -> `[out, blocks]`."""
    return values.repeat_interleave(found.width // BLOCK, 1)


def _halves(values: Tensor) -> np.ndarray:
    """`[out, blocks]` fp16 -> `[out * blocks, 2]` uint8."""
    return values.contiguous().numpy().view(np.uint8).reshape(-1, 2)


def _nibbles(codes: Tensor) -> np.ndarray:
    """`[out, in]` codes below 16 -> `[out * blocks, 16]` uint8: columns i and i + 16 of a block share a byte."""
    low, high = codes.to(torch.uint8).reshape(-1, 2, BLOCK // 2).unbind(1)
    return (low | high << 4).numpy()
