"""Products and values of uniform codes: `w = scale (code - zero)`, or `scale code + zero` with a float zero.

The weights are read as they are stored (`packed.uniform`), the values come about in registers. Where groups suit, the
product runs in integers: the inputs of a group are taken as 24-bit integers of the largest of them, multiplied and
summed up exactly, so that the result is that of fp32 arithmetic to its rounding.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from posttrain.compress.kernels.gpu.choice import multiplies
from posttrain.compress.kernels.library import DTYPES, address, call, mismatch

Zero = Literal["none", "integer", "float"]
ZEROS: dict[str, int] = {"none": 0, "integer": 1, "float": 2}


def uniform_product(
    inputs: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, kind: Zero,
    group_of: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`[..., in]` fp32 or bf16 -> `[..., out]` in the same dtype. The weights are buffers of `UniformWeight`."""
    rows, groups = scale.shape
    *others, columns = inputs.shape
    check_codes(columns, codes, scale, bits, group_of is not None)
    if multiplies(inputs):
        from posttrain.compress.kernels.gpu import _uniform

        return _uniform.uniform_product(inputs, codes, scale, zero, bits, kind, group_of)
    x = inputs.contiguous()
    out = torch.empty((*others, rows), dtype=inputs.dtype)
    call(
        "uniform_product", address(codes), address(scale), address(zero), address(group_of), rows, columns, groups,
        bits, ZEROS[kind], x.data_ptr(), DTYPES[x.dtype], x.numel() // columns, columns, out.data_ptr(),
        work=rows * columns,
    )  # fmt: skip
    return out


def uniform_values(
    columns: int, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, kind: Zero,
    group_of: Tensor | None = None, dtype: torch.dtype = torch.float32, rows: slice = slice(None),
    out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The values of some rows, `[rows, columns]` fp32, or bf16 rounded from that; in `out` where it is given."""
    all_rows, groups = scale.shape
    check_codes(columns, codes, scale, bits, group_of is not None)
    begin, end, _ = rows.indices(all_rows)
    if out is None:
        out = torch.empty(end - begin, columns, dtype=dtype)
    elif out.shape != (end - begin, columns) or not out.is_contiguous():
        raise mismatch(f"room of {list(out.shape)} for {end - begin} rows of {columns}")
    call(
        "uniform_values", address(codes), address(scale), address(zero), address(group_of), all_rows, columns, groups,
        bits, ZEROS[kind], begin, end - begin, out.data_ptr(), DTYPES[out.dtype], work=out.numel(),
    )  # fmt: skip
    return out


def check_codes(columns: int, codes: Tensor, scale: Tensor, bits: int, ordered: bool = False) -> None:
    """Whether codes and scales are those of a matrix of so many columns."""
    (rows, width), (other, groups) = codes.shape, scale.shape
    right = rows == other and width == (columns * bits + 7) // 8 and 1 <= bits <= 8
    if not right or (columns % groups and not ordered):
        raise mismatch(f"inputs of {columns} columns, codes {[rows, width]} of {bits} bits, scales {[other, groups]}")


def rows_of(inputs: Tensor) -> Tensor:
    """`[..., in]` as `[count, in]` whose rows are contiguous."""
    x = inputs if inputs.dim() == 2 else inputs.reshape(-1, inputs.shape[-1])
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
