"""`w = scale (code - zero)`, or `scale code + zero` with a float zero, times few rows of inputs.

Where codes lie in units of one group each, they are read by units, and scales applied to sums over them. Codes of other
sizes, and columns that go to groups in any order, are read one by one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from posttrain.compress.kernels.gpu._codes import COLUMNS, ROWS, grid, placed, taken, together, unpacked
from posttrain.compress.kernels.gpu._units import ROWS as UNIT_ROWS
from posttrain.compress.kernels.gpu._units import WARPS, unit, units_of

KINDS = {"none": 0, "integer": 1, "float": 2}


def uniform_product(
    inputs: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, kind: str, group_of: Tensor | None
) -> Tensor:
    """See `kernels.uniform.uniform_product`, which has checked the shapes."""
    (rows, groups), columns = scale.shape, inputs.shape[-1]
    x, out = placed(inputs, rows)
    zeros, zero_width = (scale, 0) if zero is None else (zero, zero.shape[1])
    units = units_of(codes, bits, columns, groups) if group_of is None else None
    if not len(x):
        pass
    elif units is not None:
        few = together(len(x))
        _product_of_units[triton.cdiv(rows, UNIT_ROWS), triton.cdiv(len(x), few)](
            x, units.codes, scale, zeros, out, len(x), rows, columns, groups, units.stride, zero_width, bits,
            KINDS[kind], units.bytes, units.codes_each, few, UNIT_ROWS, units.wide, num_warps=WARPS,
        )  # fmt: skip
    else:
        _product[grid(rows, len(x))](
            x, codes, scale, zeros, codes if group_of is None else group_of, out, len(x), rows, columns, groups,
            codes.shape[1], zero_width, bits, KINDS[kind], group_of is not None, together(len(x)), ROWS, COLUMNS,
        )  # fmt: skip
    return taken(out, inputs)


@triton.jit
def _product_of_units(
    x, codes, scale, zero, out, count, rows, columns, groups, stride, zero_width, bits: tl.constexpr,
    kind: tl.constexpr, size: tl.constexpr, each: tl.constexpr, few: tl.constexpr, tall: tl.constexpr,
    wide: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * tall + tl.arange(0, tall)
    token = tl.program_id(1) * few + tl.arange(0, few)
    units = columns // each
    total = tl.zeros((few, tall, wide), dtype=tl.float32)
    for begin in range(0, units, wide):
        index = begin + tl.arange(0, wide)
        inside = index < units
        there = (row[:, None] < rows) & inside[None, :]
        given = (token[:, None] < count) & inside[None, :]
        word = unit(codes + row[:, None] * stride, index[None, :], there, size)
        group = index // (units // groups)
        place = row[:, None] * groups + group[None, :]
        step = tl.load(scale + place, mask=there, other=0.0).to(tl.float32)
        if kind == 1:
            middle = unpacked(zero + row[:, None] * zero_width, group[None, :], there, bits, zero_width)
        product = tl.zeros((few, tall, wide), dtype=tl.float32)
        inputs = tl.zeros((few, wide), dtype=tl.float32)
        for k in tl.static_range(each):
            value = tl.load(x + token[:, None] * columns + index[None, :] * each + k, mask=given, other=0.0)
            value = value.to(tl.float32)
            code = (word >> (k * bits)) & ((1 << bits) - 1)
            if kind == 1:
                code -= middle
            elif kind == 0:
                code -= 1 << (bits - 1)
            else:
                inputs += value
            product += value[:, None, :] * code.to(tl.float32)[None, :, :]
        product *= step[None, :, :]
        if kind == 2:
            lowest = tl.load(zero + place, mask=there, other=0.0).to(tl.float32)
            product += inputs[:, None, :] * lowest[None, :, :]
        # 0 * inf of what is outside is no number
        total += tl.where(there[None, :, :], product, 0.0)
    target = out + token[:, None] * rows + row[None, :]
    stored = (token[:, None] < count) & (row[None, :] < rows)
    tl.store(target, tl.sum(total, axis=2).to(out.dtype.element_ty), mask=stored)


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
