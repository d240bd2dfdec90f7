"""Levels of the processor that this machine offers; tests of kernels run at each, and skip where none was built."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from posttrain.compress.kernels.library import LEVELS, offered

needs_kernels = pytest.mark.skipif(not offered(), reason="posttrain was built without its CPU kernels")
every_level = pytest.mark.parametrize(
    "level",
    [
        pytest.param(name, marks=pytest.mark.skipif(name not in offered(), reason=f"no {name} kernels here"))
        for name in LEVELS
    ],
)


def assert_product(found: Tensor, inputs: Tensor, weight: Tensor, most: float = 2e-6) -> None:
    """As a matrix product in fp64 says, to the rounding of fp32 (and of bf16 results).

    The error of a sum is in proportion to the sum of its terms' sizes; where all inputs of a group are taken as
    fractions of the largest, of that many of the largest.
    """
    expected = inputs.double() @ weight.double().T
    sizes = inputs.double().abs().amax(-1, keepdim=True) * weight.double().abs().sum(-1)
    allowed = most * sizes + 1e-30
    if found.dtype == torch.bfloat16:
        allowed = allowed + expected.abs() * 2**-8
    assert ((found.double() - expected).abs() <= allowed).all()
