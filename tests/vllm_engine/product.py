"""vLLM's product with 4-bit weights, in PyTorch: for processors without AVX-512, whose wheel lacks the kernel.

A worker of vLLM imports this file with the class that extends it. All else of loading and decoding is vLLM's own: what
it reads from the folder, how it repacks the codes, and what it hands to the product.
"""

from __future__ import annotations

import torch
from vllm.model_executor.layers.quantization.utils.quant_utils import unpack_quantized_values_into_int32
from vllm.scalar_type import scalar_types

library = torch.library.Library("_C", "FRAGMENT")
library.define(
    "cpu_gemm_wna16(Tensor input, Tensor codes, Tensor(a!) output, Tensor scales, Tensor? zeros, Tensor? bias, "
    "int pack_factor, str isa_hint) -> ()"
)


@torch.library.impl(library, "cpu_gemm_wna16", "CPU")
def product(
    rows: torch.Tensor, codes: torch.Tensor, output: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None,
    bias: torch.Tensor | None, pack_factor: int, isa_hint: str,
) -> None:  # fmt: skip
    """Write rows @ weights (+ bias) to `output`, of shape (rows, outputs).

    codes: (outputs / 16, 2 * inputs), int32; two of them hold 16 outputs of an input. scales: (groups, outputs).
    zeros: (groups, outputs / 8), int32; without them it is 8.
    """
    inputs, (groups, outputs) = rows.shape[1], scales.shape
    packed = codes.view(outputs // 16, inputs, 16 // pack_factor).transpose(0, 1).reshape(inputs, -1)
    weights = unpack_quantized_values_into_int32(packed, scalar_types.uint4, 1).view(groups, -1, outputs).float()
    middle = 8.0 if zeros is None else unpack_quantized_values_into_int32(zeros, scalar_types.uint4, 1)[:, None]
    weights = ((weights - middle) * scales[:, None]).view(inputs, outputs)
    found = rows.float() @ weights
    output.copy_(found if bias is None else found + bias)


class Worker:
    """What a worker is extended by: nothing, but that it imports this file."""
