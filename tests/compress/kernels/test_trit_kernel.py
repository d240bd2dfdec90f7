"""Products of ternary planes: equal to the dequantized matrix's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_levels import assert_product, every_level, needs_kernels

from posttrain.compress.kernels.library import forced, offered
from posttrain.compress.kernels.trits import ternary_product
from posttrain.compress.packed.ternary import TernaryWeight


def weight(planes: int, rows: int, columns: int, groups: int) -> TernaryWeight:
    return TernaryWeight.of(torch.randint(-1, 2, (planes, rows, columns)), torch.rand(planes, rows, groups) / 9 + 0.01)


@needs_kernels
@every_level
def test_every_byte_by_hand(level):
    """A unit vector for each place reads all 243 bytes' digits off."""
    byte = torch.arange(243, dtype=torch.uint8)[:, None]
    with forced(level):
        found = ternary_product(torch.eye(5), byte[None], torch.ones(1, 243, 1).half())
    expected = byte.long() // 3 ** torch.arange(5) % 3 - 1
    assert torch.equal(found.T, expected.float())


@needs_kernels
@settings(deadline=None, max_examples=60)
@given(
    planes=st.integers(1, 3), groups=st.integers(1, 20), rows=st.integers(1, 40), count=st.integers(1, 9),
    width=st.one_of(st.integers(1, 150), st.sampled_from([32, 128])), level=st.sampled_from(offered() or ("none",)),
    bf16=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(planes, groups, width, rows, count, level, bf16, seed):
    torch.manual_seed(seed)
    w = weight(planes, rows, groups * width, groups)
    x = torch.randn(count, groups * width).to(torch.bfloat16 if bf16 else torch.float32)
    with forced("off"):
        values = w.dequantize()
    with forced(level):
        assert_product(ternary_product(x, w.trits, w.scale), x, values, most=2e-6 * planes)


@needs_kernels
@every_level
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinities_stay(level, value):
    torch.manual_seed(0)
    w, x = weight(2, 8, 256, 2), torch.randn(1, 256)
    x[0, 7] = value
    with forced(level):
        assert not ternary_product(x, w.trits, w.scale).isfinite().all()
