"""Rows of packed tokens into rectangles of similar sequences and back, one pass over memory each.

Tokens are `[N, heads, width]`, a rectangle `[B, heads, R, width]`, its index `[B, R]` int64 with the token of each row,
-1 where it is padded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.native.library import call, threads


def gather(x: Tensor, index: Tensor) -> Tensor:
    """The rectangle of tokens, contiguous, zero where it is padded; the rows of `x` are contiguous each."""
    batch, rows = index.shape
    _, heads, width = x.shape
    y = x.new_empty(batch, heads, rows, width)
    call(
        "gather", x.dtype, x.data_ptr(), index, y, batch, heads, rows, width, x.stride(0), x.stride(1),
        count=threads(y.numel()),
    )  # fmt: skip
    return y


def scatter(x: Tensor, index: Tensor, y: Tensor) -> None:
    """A rectangle to its tokens in `y`, contiguous; no token comes twice in it."""
    batch, heads, rows, width = x.shape
    call("scatter", x.dtype, x, index, y, batch, heads, rows, width, count=threads(x.numel()))


def scatter_add(x: Tensor, index: Tensor, sums: Tensor) -> None:
    """A rectangle added to its tokens in `sums`, fp32 and contiguous, in the order of its rows."""
    assert sums.dtype == torch.float32
    batch, heads, rows, width = x.shape
    call("scatter_add", x.dtype, x, index, sums, batch, heads, rows, width, count=threads(x.numel()))
