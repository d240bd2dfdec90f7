r"""Products of bit planes, for weights and inputs of any number of bits.

.. math:: \sum_k w_k x_k = \sum_{i, j} 2^{i + j}\,\mathrm{popcount}(w^{(i)} \wedge x^{(j)})

Planes of a row stand in blocks of 512 columns: `[rows, ceil(columns / 512), bits, 8]` int64, lowest bit first, bit
k % 64 of word k / 64 for column k; bits beyond the last column are 0. Codes are unsigned; signed ones are stored with
2**(bits - 1) added, which is then their zero point. The work grows with the product of the two numbers of bits.

Reference: ABQ-LLM, 2024, arXiv 2408.08554 (card 151), whose engine this is for a CPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.compress.kernels.library import address, call, mismatch
from posttrain.compress.kernels.uniform import ZEROS, Zero

COLUMNS = 512  # of a block
WORD = 64  # columns of a word; groups are multiples of it


def to_planes(codes: Tensor, bits: int) -> Tensor:
    """`[rows, columns]` uint8 codes from 0 to 2**bits - 1 -> `[rows, blocks, bits, 8]` int64."""
    rows, columns = codes.shape
    out = torch.empty(rows, -(-columns // COLUMNS), bits, 8, dtype=torch.int64)
    call("planes", address(codes.contiguous()), rows, columns, bits, address(out), work=codes.numel())
    return out


def plane_sums(inputs: Tensor, weights: Tensor) -> Tensor:
    """`[count, blocks, q, 8]` by `[rows, blocks, p, 8]` -> `[count, rows]` int64, exact sums of products of codes."""
    count, rows = inputs.shape[0], weights.shape[0]
    if inputs.shape[1] != weights.shape[1]:
        raise mismatch(f"planes {list(inputs.shape)} and {list(weights.shape)}")
    out = torch.empty(count, rows, dtype=torch.int64)
    columns = weights.shape[1] * COLUMNS
    call(
        "plane_product", address(weights), None, None, rows, columns, 1, weights.shape[2], 0, address(inputs),
        inputs.shape[2], None, None, count, address(out), work=rows * columns,
    )  # fmt: skip
    return out


def plane_product(
    inputs: Tensor, input_scale: Tensor, input_sums: Tensor, weights: Tensor, scale: Tensor, zero: Tensor | None,
    kind: Zero, columns: int,
) -> Tensor:  # fmt: skip
    """Planes of inputs by planes of weights with scales and zeros of groups -> `[count, rows]` fp32.

    inputs: `[count, blocks, q, 8]`, of codes x. input_scale: `[count]`. input_sums: `[count, groups]`, the sums of the
    codes of each group. weights: `[rows, blocks, p, 8]`, scale and zero as in `UniformWeight`. Inputs with a zero point
    of their own, s (x - z), give this less s z times the sum of each row's weights.
    """
    count, rows, groups = inputs.shape[0], weights.shape[0], scale.shape[1]
    if groups > 1 and columns // groups % WORD:
        raise ValueError(f"groups of {columns // groups} columns; bit planes need multiples of {WORD}, or one group")
    planes = inputs.shape[1] == weights.shape[1] == -(-columns // COLUMNS)
    if not planes or scale.shape[0] != rows or input_sums.shape != (count, groups) or columns % groups:
        shapes = [list(t.shape) for t in (inputs, weights, scale, input_sums)]
        raise mismatch(f"planes, planes, scales and sums {shapes} of {columns} columns")
    out = torch.empty(count, rows)
    sums, scales = input_sums.to(torch.float32).contiguous(), input_scale.to(torch.float32).contiguous()
    call(
        "plane_product", address(weights), address(scale), address(zero), rows, columns, groups, weights.shape[2],
        ZEROS[kind], address(inputs), inputs.shape[2], address(sums), address(scales), count, address(out),
        work=rows * columns,
    )  # fmt: skip
    return out
