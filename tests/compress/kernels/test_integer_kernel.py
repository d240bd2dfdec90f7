"""Products in integers: exactly those of 64-bit arithmetic."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_levels import assert_product, every_level, needs_kernels

from posttrain.compress.kernels.integers import code_product, int8_product, scaled_product
from posttrain.compress.kernels.library import forced, offered
from posttrain.compress.packed.bits import pack
from posttrain.compress.packed.uniform import UniformWeight


def signed(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8)


@needs_kernels
@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(1, 8), columns=st.integers(1, 700), rows=st.integers(1, 40), count=st.integers(1, 9),
    level=st.sampled_from(offered() or ("none",)), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_sums_are_exact(bits, columns, rows, count, level, seed):
    torch.manual_seed(seed)
    x, codes, w = signed(count, columns), torch.randint(0, 1 << bits, (rows, columns)), signed(rows, columns)
    with forced(level):
        assert torch.equal(code_product(x, pack(codes, bits), bits).long(), x.long() @ codes.T)
        assert torch.equal(int8_product(x, w).long(), x.long() @ w.long().T)


@needs_kernels
@every_level
def test_extremes_do_not_overflow(level):
    x, w = torch.full((1, 30000), -128, dtype=torch.int8), torch.full((2, 30000), -128, dtype=torch.int8)
    with forced(level):
        assert int8_product(x, w).tolist() == [[30000 * 2**14] * 2]
        assert code_product(x, torch.full((2, 30000), 255, dtype=torch.uint8), 8).tolist() == [[-30000 * 128 * 255] * 2]


@needs_kernels
@every_level
@pytest.mark.parametrize("bits", range(1, 9))
def test_with_scales_equals_the_dequantized_product(bits, level):
    torch.manual_seed(bits)
    for kind in ("none", "integer", "float"):
        for columns, groups in ((64, 1), (576, 6), (2048, 64), (1000, 1), (96, 4), (15, 3)):
            zero = torch.randint(0, 1 << bits, (5, groups)).float() if kind == "integer" else torch.randn(5, groups) / 9
            codes = torch.randint(0, 1 << bits, (5, columns))
            w = UniformWeight.of(codes, torch.rand(5, groups) / 9 + 0.01, zero, bits, kind)
            x, scale = signed(6, columns), torch.rand(6) + 0.1
            with forced(level):
                found = scaled_product(x, scale, w.codes, w.scale, w.zero, bits, kind)
            with forced("off"):
                values = w.dequantize()
            assert_product(found, x.float() * scale[:, None], values)
