"""What the kernels share: codes out of packed bytes, and sizes of blocks."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 16, 128  # of the matrix, that a program goes through at a time
INPUTS = 4  # rows of inputs that a program multiplies together


@triton.jit
def unpacked(row, index, there, bits: tl.constexpr, width):
    """Code number `index` of a row of packed bytes, lowest bits first; row: pointers to its first byte, width: bytes.

    there: where there is such a code. A code that does not divide a byte may lie in two of them.
    """
    first = index * bits
    place = first // 8
    byte = tl.load(row + place, mask=there, other=0).to(tl.int32)
    if 8 % bits != 0:
        following = tl.load(row + place + 1, mask=there & (place + 1 < width), other=0).to(tl.int32)
        byte = byte | (following << 8)
    return (byte >> (first % 8)) & ((1 << bits) - 1)


def grid(rows: int, count: int) -> tuple[int, int]:
    """Programs for a matrix of so many rows and so many inputs."""
    return triton.cdiv(rows, ROWS), triton.cdiv(count, together(count))


def together(count: int) -> int:
    """Rows of inputs a program, a power of two."""
    return min(INPUTS, triton.next_power_of_2(max(1, count)))


def placed(inputs: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """`[..., in]` inputs as `[count, in]`, row after row, and room for `[count, out]` in their dtype.

    Where they are interpreted the room is fp32: the interpreter loses the carry when it rounds to bf16.
    """
    x = inputs.reshape(-1, inputs.shape[-1]).contiguous()
    return x, torch.empty(x.shape[0], rows, dtype=x.dtype if x.is_cuda else torch.float32, device=x.device)


def taken(out: Tensor, inputs: Tensor) -> Tensor:
    """What was written into that room as `[..., out]` in the dtype of the inputs."""
    return out.to(inputs.dtype).view(*inputs.shape[:-1], out.shape[1])
