"""`w = scale table[code]` times few rows of inputs; sign planes are codes of one bit.

Read by units where codes lie in units of one group each, as in `_uniform`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from posttrain.compress.kernels.gpu._codes import COLUMNS, ROWS, grid, placed, taken, together, unpacked
from posttrain.compress.kernels.gpu._units import ROWS as UNIT_ROWS
from posttrain.compress.kernels.gpu._units import WARPS, unit, units_of


def table_product(inputs: Tensor, codes: Tensor, table: Tensor, scale: Tensor, bits: int) -> Tensor:
    """See `kernels.table.table_product`, which has checked the shapes. scale: `[out, groups]` fp16 or fp32."""
    (rows, groups), columns = scale.shape, inputs.shape[-1]
    x, out = placed(inputs, rows)
    units = units_of(codes, bits, columns, groups)
    few = together(len(x))
    if not len(x):
        pass
    elif units is not None:
        _product_of_units[triton.cdiv(rows, UNIT_ROWS), triton.cdiv(len(x), few)](
            x, units.codes, table, scale, out, len(x), rows, columns, groups, units.stride, bits, units.bytes,
            units.codes_each, few, UNIT_ROWS, units.wide, num_warps=WARPS,
        )  # fmt: skip
    else:
        _product[grid(rows, len(x))](
            x, codes, table, scale, out, len(x), rows, columns, groups, codes.shape[1], bits, few, ROWS, COLUMNS
        )
    return taken(out, inputs)


@triton.jit
def _product_of_units(
    x, codes, table, scale, out, count, rows, columns, groups, stride, bits: tl.constexpr, size: tl.constexpr,
    each: tl.constexpr, few: tl.constexpr, tall: tl.constexpr, wide: tl.constexpr,
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
        product = tl.zeros((few, tall, wide), dtype=tl.float32)
        for k in tl.static_range(each):
            value = tl.load(x + token[:, None] * columns + index[None, :] * each + k, mask=given, other=0.0)
            level = tl.load(table + ((word >> (k * bits)) & ((1 << bits) - 1)), mask=there, other=0.0)
            product += value.to(tl.float32)[:, None, :] * level[None, :, :]
        place = row[:, None] * groups + (index // (units // groups))[None, :]
        product *= tl.load(scale + place, mask=there, other=0.0).to(tl.float32)[None, :, :]
        # 0 * inf of what is outside is no number
        total += tl.where(there[None, :, :], product, 0.0)
    target = out + token[:, None] * rows + row[None, :]
    stored = (token[:, None] < count) & (row[None, :] < rows)
    tl.store(target, tl.sum(total, axis=2).to(out.dtype.element_ty), mask=stored)


@triton.jit
def _product(
    x, codes, table, scale, out, count, rows, columns, groups, width, bits: tl.constexpr, few: tl.constexpr,
    tall: tl.constexpr, wide: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * tall + tl.arange(0, tall)
    token = tl.program_id(1) * few + tl.arange(0, few)
    total = tl.zeros((few, tall), dtype=tl.float32)
    for begin in range(0, columns, wide):
        column = begin + tl.arange(0, wide)
        inside = column < columns
        there = (row[:, None] < rows) & inside[None, :]
        code = unpacked(codes + row[:, None] * width, column[None, :], there, bits, width)
        level = tl.load(table + code, mask=there, other=0.0)
        place = row[:, None] * groups + (column // (columns // groups))[None, :]
        value = level * tl.load(scale + place, mask=there, other=0.0).to(tl.float32)
        given = (token[:, None] < count) & inside[None, :]
        part = tl.load(x + token[:, None] * columns + column[None, :], mask=given, other=0.0).to(tl.float32)
        total += tl.sum(part[:, None, :] * value[None, :, :], axis=2)
    target = out + token[:, None] * rows + row[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=(token[:, None] < count) & (row[None, :] < rows))
