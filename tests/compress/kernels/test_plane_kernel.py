"""Products of bit planes: exactly those of the codes, for all numbers of bits."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_levels import assert_product, every_level, needs_kernels

from posttrain.compress.kernels.library import forced, offered
from posttrain.compress.kernels.planes import plane_product, plane_sums, to_planes
from posttrain.compress.packed.uniform import UniformWeight


def codes(rows: int, columns: int, bits: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)


@needs_kernels
@every_level
def test_three_by_five_is_fifteen(level):
    with forced(level):
        w, x = (
            to_planes(torch.tensor([[3]], dtype=torch.uint8), 2),
            to_planes(torch.tensor([[5]], dtype=torch.uint8), 3),
        )
        assert w[0, 0, :, 0].tolist() == [1, 1]
        assert x[0, 0, :, 0].tolist() == [1, 0, 1]
        assert plane_sums(x, w).tolist() == [[15]]


@needs_kernels
@every_level
def test_sums_are_exact_for_all_bits(level):
    torch.manual_seed(0)
    with forced(level):
        for p, q in product(range(1, 9), range(1, 9)):
            w, x = codes(5, 600, p), codes(2, 600, q)
            assert torch.equal(plane_sums(to_planes(x, q), to_planes(w, p)), x.long() @ w.long().T)


@needs_kernels
@settings(deadline=None, max_examples=40)
@given(
    p=st.integers(1, 8), q=st.integers(1, 8), columns=st.integers(1, 1200), rows=st.integers(1, 20),
    count=st.integers(1, 7), level=st.sampled_from(offered() or ("none",)), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(p, q, columns, rows, count, level, seed):
    torch.manual_seed(seed)
    w, x = codes(rows, columns, p), codes(count, columns, q)
    with forced(level):
        assert torch.equal(plane_sums(to_planes(x, q), to_planes(w, p)), x.long() @ w.long().T)


@needs_kernels
@every_level
@pytest.mark.parametrize("bits", [1, 2, 3, 5])
def test_signed_codes_are_unsigned_ones_with_a_zero_point(bits, level):
    torch.manual_seed(0)
    half = 1 << (bits - 1)
    w, x = torch.randint(-half, half, (6, 300)), torch.randint(-128, 128, (3, 300))
    with forced(level):
        found = plane_sums(to_planes((x + 128).to(torch.uint8), 8), to_planes((w + half).to(torch.uint8), bits))
    back = found - 128 * (w + half).sum(1) - half * (x + 128).sum(1, keepdim=True) + 300 * half * 128
    assert torch.equal(back, x @ w.T)


@needs_kernels
@every_level
@pytest.mark.parametrize("kind", ["none", "integer", "float"])
def test_with_scales_equals_the_dequantized_product(kind, level):
    torch.manual_seed(0)
    for bits, q, columns, groups in (
        (2, 8, 4096, 32),
        (3, 4, 1024, 1),
        (1, 8, 1536, 3),
        (4, 4, 576, 9),
        (2, 8, 1000, 1),
    ):
        raw = codes(7, columns, bits)
        zero = codes(7, groups, bits).float() if kind == "integer" else torch.randn(7, groups) / 9
        w = UniformWeight.of(raw, torch.rand(7, groups) / 9 + 0.01, zero, bits, kind)
        x, scale = codes(3, columns, q), torch.rand(3) + 0.1
        sums = x.view(3, groups, -1).sum(-1)
        with forced(level):
            found = plane_product(to_planes(x, q), scale, sums, to_planes(raw, bits), w.scale, w.zero, kind, columns)
        with forced("off"):
            values = w.dequantize()
        assert_product(found, x.float() * scale[:, None], values)


@needs_kernels
def test_groups_across_words_are_refused():
    with pytest.raises(ValueError, match="groups of 48 columns"):
        plane_product(
            to_planes(codes(1, 96, 8), 8), torch.ones(1), torch.ones(1, 2), to_planes(codes(2, 96, 2), 2),
            torch.ones(2, 2).half(), None, "none", 96,
        )  # fmt: skip
