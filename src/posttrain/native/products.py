"""What products of matrices in bf16 want before and after on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.native.library import call, threads


def transposed(matrix: Tensor) -> Tensor:
    """A transposed copy, `[columns, rows]`, of a bf16 matrix whose rows are contiguous each (a part of the columns of a
    larger one may be given).
    """
    rows, columns = matrix.shape
    if rows == 0 or matrix.stride(1) != 1:
        return matrix.T.contiguous()
    found = torch.empty(columns, rows, dtype=matrix.dtype, device=matrix.device)
    call(
        "transpose", matrix.dtype, matrix.data_ptr(), found, rows, columns, matrix.stride(0),
        count=threads(matrix.numel()),
    )  # fmt: skip
    return found


def add(total: Tensor, product: Tensor) -> None:
    """Add a product `[rows, width]` in bf16 to a sum in fp32, in place; both contiguous."""
    rows, width = product.shape
    call("add", product.dtype, total, product, rows, width, count=threads(product.numel()))
