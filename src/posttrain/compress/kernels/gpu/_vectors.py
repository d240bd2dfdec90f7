"""Indices into tables of vectors, times few rows of inputs."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from posttrain.compress.kernels.gpu._codes import unpacked

VECTORS, COLUMNS = 4, 64  # that a program goes through at a time


def vector_product(
    inputs: Tensor, codes: Tensor, centroids: Tensor, residual: Tensor | None, rows: int, out: Tensor, first: int,
    rest: int,
) -> None:  # fmt: skip
    """See `kernels.vectors.vector_product`, which has checked the shapes. first, rest: an index's bits."""
    (count, columns), (vectors, width), length = inputs.shape, codes.shape, centroids.shape[1]
    if count:
        _product[(triton.cdiv(vectors, VECTORS), count)](
            inputs, codes, centroids, centroids if residual is None else residual, out, rows, columns, vectors, width,
            length, first, rest, triton.next_power_of_2(length), VECTORS, COLUMNS,
        )  # fmt: skip


@triton.jit
def _product(
    x, codes, centroids, residual, out, rows, columns, vectors, width, length: tl.constexpr, first: tl.constexpr,
    rest: tl.constexpr, padded: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    vector = tl.program_id(0) * tall + tl.arange(0, tall)
    token = tl.program_id(1)
    entry = tl.arange(0, padded)
    total = tl.zeros((tall, padded), dtype=tl.float32)
    bits: tl.constexpr = first + rest
    for begin in range(0, columns, wide):
        column = begin + tl.arange(0, wide)
        there = (vector[:, None] < vectors) & (column[None, :] < columns)
        line = codes + vector[:, None] * width
        index = unpacked(line, column[None, :], there, min(8, bits), width)
        if bits > 8:  # the next bits of all columns stand behind the lowest ones
            index = index | (unpacked(line + columns, column[None, :], there, min(8, bits - 8), width - columns) << 8)
        if bits > 16:
            last = unpacked(line + 2 * columns, column[None, :], there, bits - 16, width - 2 * columns)
            index = index | (last << 16)
        known = there[:, None, :] & (entry[None, :, None] < length)
        low = index & ((1 << first) - 1)
        value = tl.load(centroids + low[:, None, :] * length + entry[None, :, None], mask=known, other=0.0).to(
            tl.float32
        )
        if rest > 0:
            high = index >> first
            value += tl.load(residual + high[:, None, :] * length + entry[None, :, None], mask=known, other=0.0).to(
                tl.float32
            )
        part = tl.load(x + token * columns + column, mask=column < columns, other=0.0)
        total += tl.sum(value * part[None, None, :], axis=2)
    row = vector[:, None] * length + entry[None, :]
    inside = (entry[None, :] < length) & (row < rows)
    target = out + token * rows + row
    tl.store(target, tl.load(target, mask=inside, other=0.0) + total, mask=inside)
