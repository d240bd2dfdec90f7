"""When a packed weight's product takes its kernel: with few rows of inputs; with many, values are made and multiplied.

The crossover is where a product with `FEW` rows takes as long as making the values (a panel of rows of the matrix at a
time, so that they stay in the cache) and a matrix product of torch's; `benchmarks/kernels.py` measures it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.compress.kernels.gpu.choice import multiplies
from posttrain.compress.kernels.library import runs_on

FEW = 16  # rows of inputs up to which the kernels are the faster way
PANEL = 1 << 19  # values that are made at once


def few(inputs: Tensor) -> bool:
    """Whether the kernels pay for so many rows."""
    return 0 < inputs.numel() <= FEW * inputs.shape[-1]


def few_rows(inputs: Tensor, *weights: Tensor | None) -> bool:
    """Whether there is a kernel for these inputs, of the CPU or of the GPU that they are on, and it pays."""
    return few(inputs) and (runs_on(inputs, *weights) or multiplies(inputs, *weights))


def by_panels(inputs: Tensor, shape: tuple[int, int], values: Callable[[slice, Tensor], Tensor]) -> Tensor:
    """`[..., in]` times the transposed matrix of that shape; `values(rows, room)` writes some rows into a tensor of the
    inputs' dtype.
    """
    rows, columns = shape
    step = max(1, PANEL // columns)
    x = inputs.reshape(-1, columns)
    out = torch.empty(x.shape[0], rows, dtype=x.dtype)
    room = torch.empty(min(step, rows), columns, dtype=x.dtype)
    for begin in range(0, rows, step):
        panel = slice(begin, min(begin + step, rows))
        out[:, panel] = F.linear(x, values(panel, room[: panel.stop - begin]))
    return out.view(*inputs.shape[:-1], rows)
