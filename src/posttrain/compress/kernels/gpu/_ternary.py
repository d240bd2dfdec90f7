"""`w = sum_k scale_k trit_k`, five trits a byte, times few rows of inputs."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from posttrain.compress.kernels.gpu._codes import placed, taken, together

ROWS, BYTES = 4, 256  # of a plane, that a program goes through at a time


def ternary_product(inputs: Tensor, trits: Tensor, scale: Tensor) -> Tensor:
    """See `kernels.trits.ternary_product`, which has checked the shapes."""
    (planes, rows, groups), columns = scale.shape, inputs.shape[-1]
    x, out = placed(inputs, rows)
    if len(x):
        few = together(len(x))
        _product[triton.cdiv(rows, ROWS), triton.cdiv(len(x), few)](
            x, trits, scale, out, len(x), rows, columns, groups, trits.shape[2], planes, few, ROWS, BYTES
        )
    return taken(out, inputs)


@triton.jit
def _product(
    x, trits, scale, out, count, rows, columns, groups, width, planes: tl.constexpr, few: tl.constexpr,
    tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * tall + tl.arange(0, tall)
    token = tl.program_id(1) * few + tl.arange(0, few)
    total = tl.zeros((few, tall, wide), dtype=tl.float32)
    each = columns // groups
    for begin in range(0, width, wide):
        place = begin + tl.arange(0, wide)
        for plane in tl.static_range(planes):
            line = plane * rows + row[:, None]
            held = (row[:, None] < rows) & (place < width)[None, :]
            byte = tl.load(trits + line * width + place[None, :], mask=held, other=0).to(tl.int32)
            # a group may end within a byte, so that each of its trits has its own scale
            for k in tl.static_range(5):
                column = place * 5 + k
                inside = column < columns
                there = (row[:, None] < rows) & inside[None, :]
                step = tl.load(scale + line * groups + (column // each)[None, :], mask=there, other=0.0)
                value = tl.where(there, (byte % 3 - 1).to(tl.float32) * step.to(tl.float32), 0.0)
                byte = byte // 3
                given = (token[:, None] < count) & inside[None, :]
                part = tl.load(x + token[:, None] * columns + column[None, :], mask=given, other=0.0).to(tl.float32)
                total += part[:, None, :] * value[None, :, :]
    target = out + token[:, None] * rows + row[None, :]
    stored = (token[:, None] < count) & (row[None, :] < rows)
    tl.store(target, tl.sum(total, axis=2).to(out.dtype.element_ty), mask=stored)
