"""`w = scale table[code]` times few rows of inputs; sign planes are codes of one bit."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from posttrain.compress.kernels.gpu._codes import COLUMNS, ROWS, grid, placed, taken, together, unpacked


def table_product(inputs: Tensor, codes: Tensor, table: Tensor, scale: Tensor, bits: int) -> Tensor:
    """See `kernels.table.table_product`, which has checked the shapes. scale: `[out, groups]` fp16 or fp32."""
    (rows, groups), columns = scale.shape, inputs.shape[-1]
    x, out = placed(inputs, rows)
    if len(x):
        _product[grid(rows, len(x))](
            x, codes, table, scale, out, len(x), rows, columns, groups, codes.shape[1], bits, together(len(x)), ROWS,
            COLUMNS,
        )  # fmt: skip
    return taken(out, inputs)


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
