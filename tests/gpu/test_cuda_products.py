"""Packed weights on a GPU: Triton's kernels at sizes of real layers, many rows at a time, and in a whole model."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from on_gpu import DEVICE, apart, drawn_prompts, gpu, small_policy

from posttrain.compress.packed.linear import PackedLinear
from posttrain.compress.packed.scales import Scales
from posttrain.compress.packed.table import TableWeight
from posttrain.compress.packed.ternary import TernaryWeight
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.packed.vector import Books, VectorWeight
from posttrain.compress.packed.weight import PackedWeight
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.trajectory import Sampling

pytestmark = [
    *gpu,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed"),
    pytest.mark.skipif(DEVICE.type == "cpu", reason="on the CPU there are other kernels"),
]
ROWS, COLUMNS = 1536, 2048  # ROWS no multiple of a power of two above 512


def made(kind: str) -> PackedWeight:
    torch.manual_seed(0)
    codes = torch.randint(0, 256, (ROWS, COLUMNS))
    groups = COLUMNS // 128
    scale = torch.rand(ROWS, groups) / 64 + 0.01
    if kind.startswith("uniform"):
        bits = int(kind[-1])
        zero = torch.randint(0, 1 << bits, (ROWS, groups)).float()
        return UniformWeight.of(codes % (1 << bits), scale, zero, bits, "integer")
    if kind == "nf4":
        return TableWeight.of(codes % 16, Scales.of(scale, "half"), 4, "nf4")
    if kind == "ternary":
        return TernaryWeight.of(codes[None].expand(2, -1, -1) % 3 - 1, scale.expand(2, -1, -1))
    index = torch.randint(0, 1 << 16, (ROWS // 8, COLUMNS))
    return VectorWeight.of(ROWS, [(Books(8, 16), index, torch.randn(1 << 16, 8), None)])


KINDS = ("uniform 2", "uniform 3", "uniform 4", "uniform 8", "nf4", "ternary", "vectors")


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_real_sizes(kind: str) -> None:
    weight = made(kind).to(DEVICE)
    values = weight.dequantize().double()
    for count in (1, 3, 8, 16, 40):
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)):
            x = torch.randn(count, COLUMNS, device=DEVICE).to(dtype)
            found = weight.product(x)
            assert (found.dtype, found.shape) == (dtype, (count, ROWS))
            assert apart(found, x.double() @ values.T) <= tolerance, (count, dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_the_cpu(kind: str) -> None:
    weight = made(kind)
    expected = weight.dequantize()
    assert apart(weight.to(DEVICE).dequantize(), expected) <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_model_of_packed_layers_decodes_as_its_values_do(dtype: torch.dtype) -> None:
    packed, plain = small_policy(dtype), small_policy(dtype)
    for layer, other in zip(packed.base.model.layers, plain.base.model.layers, strict=True):
        for name in ("gate_proj", "up_proj", "down_proj"):
            linear = getattr(layer.mlp, name)
            rows, columns = linear.weight.shape
            scale = linear.weight.float().abs().view(rows, -1, 64).amax(-1) / 7
            codes = (linear.weight.float().view(rows, -1, 64) / scale[..., None] + 8).round().clamp(0, 15)
            weight = UniformWeight.of(
                codes.view(rows, columns).long().cpu(), scale.cpu(), torch.full(scale.shape, 8.0), 4, "integer"
            )
            setattr(layer.mlp, name, PackedLinear(weight).to(DEVICE))
            getattr(other.mlp, name).weight.data.copy_(weight.dequantize())
    prompts, sampling = drawn_prompts((5, 40, 12)), Sampling(max_tokens=30)
    found, expected = (EmbeddedEngine(p).generate(prompts, 2, sampling, seed=0) for p in (packed, plain))
    if dtype == torch.float32:
        assert all(
            torch.equal(a.tokens, b.tokens)
            for x, y in zip(found, expected, strict=True)
            for a, b in zip(x, y, strict=True)
        )
    first = [(a.logp[0], b.logp[0]) for x, y in zip(found, expected, strict=True) for a, b in zip(x, y, strict=True)]
    assert all(abs(float(a - b)) <= (1e-3 if dtype == torch.float32 else 0.3) for a, b in first)
