"""`w = scale (code - zero)`, or `scale code + zero` with a float zero, times few rows of inputs."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from posttrain.compress.kernels.gpu._codes import COLUMNS, ROWS, grid, placed, taken, together, unpacked

KINDS = {"none": 0, "integer": 1, "float": 2}


def uniform_product(
    inputs: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, kind: str, group_of: Tensor | None
) -> Tensor:
    """See `kernels.uniform.uniform_product`, which has checked the shapes."""
    (rows, groups), columns = scale.shape, inputs.shape[-1]
    x, out = placed(inputs, rows)
    if len(x):
        _product[grid(rows, len(x))](
            x, codes, scale, scale if zero is None else zero, codes if group_of is None else group_of, out, len(x),
            rows, columns, groups, codes.shape[1], 0 if zero is None else zero.shape[1], bits, KINDS[kind],
            group_of is not None, together(len(x)), ROWS, COLUMNS,
        )  # fmt: skip
    return taken(out, inputs)


@triton.jit
def _product(
    x, codes, scale, zero, group_of, out, count, rows, columns, groups, width, zero_width, bits: tl.constexpr,
    kind: tl.constexpr, ordered: tl.constexpr, few: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * tall + tl.arange(0, tall)
    token = tl.program_id(1) * few + tl.arange(0, few)
    total = tl.zeros((few, tall), dtype=tl.float32)
    for begin in range(0, columns, wide):
        column = begin + tl.arange(0, wide)
        inside = column < columns
        there = (row[:, None] < rows) & inside[None, :]
        code = unpacked(codes + row[:, None] * width, column[None, :], there, bits, width).to(tl.float32)
        if ordered:
            group = tl.load(group_of + column, mask=inside, other=0).to(tl.int32)
        else:
            group = column // (columns // groups)
        place = row[:, None] * groups + group[None, :]
        step = tl.load(scale + place, mask=there, other=0.0).to(tl.float32)
        if kind == 2:
            value = code * step + tl.load(zero + place, mask=there, other=0.0).to(tl.float32)
        elif kind == 1:
            middle = unpacked(zero + row[:, None] * zero_width, group[None, :], there, bits, zero_width)
            value = (code - middle.to(tl.float32)) * step
        else:
            value = (code - (1 << (bits - 1))) * step
        value = tl.where(there, value, 0.0)
        given = (token[:, None] < count) & inside[None, :]
        part = tl.load(x + token[:, None] * columns + column[None, :], mask=given, other=0.0).to(tl.float32)
        total += tl.sum(part[:, None, :] * value[None, :, :], axis=2)
    target = out + token[:, None] * rows + row[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(token[:, None] < count) & (row[None, :] < rows))
