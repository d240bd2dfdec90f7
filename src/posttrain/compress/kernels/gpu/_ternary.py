"""`w = sum_k scale_k trit_k`, five trits a byte, times few rows of inputs."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from posttrain.compress.kernels.gpu._codes import COLUMNS, ROWS, grid, placed, taken, together


def ternary_product(inputs: Tensor, trits: Tensor, scale: Tensor) -> Tensor:
    """See `kernels.trits.ternary_product`, which has checked the shapes."""
    (planes, rows, groups), columns = scale.shape, inputs.shape[-1]
    x, out = placed(inputs, rows)
    if len(x):
        _product[grid(rows, len(x))](
            x, trits, scale, out, len(x), rows, columns, groups, trits.shape[2], planes, together(len(x)), ROWS, COLUMNS
        )
    return taken(out, inputs)


@triton.jit
def _product(
    x, trits, scale, out, count, rows, columns, groups, width, planes: tl.constexpr, few: tl.constexpr,
    tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * tall + tl.arange(0, tall)
    token = tl.program_id(1) * few + tl.arange(0, few)
    total = tl.zeros((few, tall), dtype=tl.float32)
    for begin in range(0, columns, wide):
        column = begin + tl.arange(0, wide)
        inside = column < columns
        there = (row[:, None] < rows) & inside[None, :]
        digit = column % 5
        power = tl.where(digit == 0, 1, tl.where(digit == 1, 3, tl.where(digit == 2, 9, tl.where(digit == 3, 27, 81))))
        group = column // (columns // groups)
        value = tl.zeros((tall, wide), dtype=tl.float32)
        for plane in tl.static_range(planes):
            line = plane * rows + row
            byte = tl.load(trits + line[:, None] * width + (column // 5)[None, :], mask=there, other=0).to(tl.int32)
            trit = ((byte // power[None, :]) % 3 - 1).to(tl.float32)
            value += trit * tl.load(scale + line[:, None] * groups + group[None, :], mask=there, other=0.0).to(
                tl.float32
            )
        given = (token[:, None] < count) & inside[None, :]
        part = tl.load(x + token[:, None] * columns + column[None, :], mask=given, other=0.0).to(tl.float32)
        total += tl.sum(part[:, None, :] * value[None, :, :], axis=2)
    target = out + token[:, None] * rows + row[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(token[:, None] < count) & (row[None, :] < rows))
