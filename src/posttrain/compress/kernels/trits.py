"""Products of sums of ternary planes, five trits a byte (`packed.ternary`, `packed.trits`)."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.compress.kernels.gpu.choice import multiplies
from posttrain.compress.kernels.library import DTYPES, address, call, mismatch
from posttrain.compress.kernels.uniform import rows_of


def ternary_product(inputs: Tensor, trits: Tensor, scale: Tensor) -> Tensor:
    """`[..., in]` fp32 or bf16 -> `[..., out]` of `w = sum_k scale_k trit_k`.

    trits: `[planes, out, ceil(in / 5)]` uint8, trit i of a byte weighing 3**i. scale: `[planes, out, groups]` fp16.
    """
    planes, rows, groups = scale.shape
    columns = inputs.shape[-1]
    if trits.shape != (planes, rows, -(-columns // 5)) or columns % groups:
        raise mismatch(f"inputs of {columns} columns, trits {list(trits.shape)} and scales {list(scale.shape)}")
    if multiplies(inputs):
        from posttrain.compress.kernels.gpu import _ternary

        return _ternary.ternary_product(inputs, trits, scale)
    x = rows_of(inputs)
    out = torch.empty(x.shape[0], rows, dtype=x.dtype)
    call(
        "ternary_product", address(trits), address(scale), planes, rows, columns, groups, x.data_ptr(), DTYPES[x.dtype],
        x.shape[0], x.stride(0), out.data_ptr(), work=planes * rows * columns,
    )  # fmt: skip
    return out.view(*inputs.shape[:-1], rows)
