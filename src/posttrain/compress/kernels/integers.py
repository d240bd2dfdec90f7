"""Products in integers: signed bytes, or packed codes, by inputs that are signed bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.compress.kernels.library import address, call, mismatch
from posttrain.compress.kernels.uniform import ZEROS, Zero, check_codes


def int8_product(inputs: Tensor, weight: Tensor) -> Tensor:
    """`[count, in]` int8 times `[out, in]` int8, transposed -> `[count, out]` int32, exact."""
    return _sums(inputs, weight.view(torch.uint8), 8, turned=True)


def code_product(inputs: Tensor, codes: Tensor, bits: int) -> Tensor:
    """`[count, in]` int8 times packed codes below 2**bits, `[out, ceil(in * bits / 8)]` -> `[count, out]` int32."""
    return _sums(inputs, codes, bits, turned=False)


def _sums(inputs: Tensor, codes: Tensor, bits: int, turned: bool) -> Tensor:
    (count, columns), rows = inputs.shape, codes.shape[0]
    if codes.shape[1] != (columns * bits + 7) // 8 or inputs.dtype != torch.int8:
        raise mismatch(f"{inputs.dtype} inputs of {columns} columns and codes {list(codes.shape)} of {bits} bits")
    out = torch.empty(count, rows, dtype=torch.int32)
    x = inputs.contiguous()
    call(
        "integer_product", address(codes), None, None, rows, columns, 1, bits, 0, int(turned), address(x), None, count,
        address(out), work=rows * columns,
    )  # fmt: skip
    return out


def scaled_product(
    inputs: Tensor, input_scale: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, bits: int, kind: Zero
) -> Tensor:
    """`[count, in]` int8 inputs, a scale `[count]` each, by buffers of `UniformWeight` -> `[count, out]` fp32.

    Sums of a group are exact; scales and zeros are applied to them. Inputs with a zero point of their own, s (q - z),
    give this for q less s z times the sum of each row's weights.
    """
    (count, columns), (rows, groups) = inputs.shape, scale.shape
    check_codes(columns, codes, scale, bits)
    if inputs.dtype != torch.int8 or input_scale.shape != (count,):
        raise mismatch(f"{inputs.dtype} inputs {list(inputs.shape)} with scales {list(input_scale.shape)}")
    out = torch.empty(count, rows)
    x, s = inputs.contiguous(), input_scale.to(torch.float32).contiguous()
    call(
        "integer_product", address(codes), address(scale), address(zero), rows, columns, groups, bits, ZEROS[kind], 0,
        address(x), address(s), count, address(out), work=rows * columns,
    )  # fmt: skip
    return out
