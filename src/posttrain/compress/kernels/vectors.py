"""Vector codes: several weights of a column share an index into a table of vectors (`packed.vector`). Their
products, and the search for the nearest entry of a table.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.compress.kernels.gpu.choice import multiplies
from posttrain.compress.kernels.library import address, call, mismatch
from posttrain.trajectory import PosttrainError

LONGEST = 16  # weights of a vector


def vector_product(
    inputs: Tensor, codes: Tensor, centroids: Tensor, residual: Tensor | None, rows: int, out: Tensor | None = None
) -> Tensor:
    """`[count, in]` fp32 -> `[count, out]` fp32, added to `out` where it is given.

    codes: `[ceil(out / length), bytes]` uint8, indices of a row as `pack_wide` stores them, the residual's above the
    first's. centroids: `[2**first, length]` fp16. residual: `[2**rest, length]` fp16 or None.
    """
    count, columns = inputs.shape
    length = centroids.shape[1]
    if length > LONGEST:
        raise PosttrainError(f"vectors of {length} weights; the kernel takes up to {LONGEST}")
    first = (centroids.shape[0] - 1).bit_length()
    rest = 0 if residual is None else (residual.shape[0] - 1).bit_length()
    width = sum((columns * min(8, first + rest - low) + 7) // 8 for low in range(0, first + rest, 8))
    if codes.shape != (-(-rows // length), width) or first + rest > 24:
        raise mismatch(f"{columns} columns, {rows} rows and indices {list(codes.shape)} of {first} + {rest} bits")
    x = inputs.contiguous()
    if out is None:
        out = torch.zeros(count, rows, device=x.device)
    if multiplies(x):
        from posttrain.compress.kernels.gpu import _vectors

        _vectors.vector_product(x, codes, centroids, residual, rows, out, first, rest)
        return out
    call(
        "vector_product", address(codes), address(centroids), address(residual), rows, columns, length, first, rest,
        address(x), count, address(out), work=rows * columns,
    )  # fmt: skip
    return out


def nearest_entries(vectors: Tensor, table: Tensor) -> Tensor:
    """`[n, v]` and `[k, v]` fp32 -> `[n]` int64: the entry nearest to each vector (of equals the first)."""
    count, width = vectors.shape
    if table.shape[1] != width or vectors.dtype != torch.float32 or table.dtype != torch.float32:
        raise mismatch(f"vectors {list(vectors.shape)} {vectors.dtype}, table {list(table.shape)} {table.dtype}")
    given, entries = vectors.contiguous(), table.contiguous()
    found = torch.empty(count, dtype=torch.int64)
    call(
        "nearest", address(given), address(entries), count, len(entries), width, address(found),
        work=count * len(entries) * width,
    )  # fmt: skip
    return found
