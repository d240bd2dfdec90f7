"""Products and values of uniform codes: equal to the dequantized matrix's, for all shapes and at every level."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_levels import assert_product, every_level, needs_kernels

from posttrain.compress.kernels.library import forced, offered
from posttrain.compress.kernels.uniform import uniform_product, uniform_values
from posttrain.compress.packed.uniform import UniformWeight

# columns and groups: whole blocks, several groups a block, one a row, groups across blocks, odd widths
SHAPES = [
    (64, 1),
    (128, 2),
    (1000, 1),
    (2048, 64),
    (576, 6),
    (96, 4),
    (120, 5),
    (7, 1),
    (1536, 3),
    (4100, 1),
    (640, 10),
]


def weight(rows: int, columns: int, groups: int, bits: int, kind: str, ordered: bool = False) -> UniformWeight:
    codes = torch.randint(0, 1 << bits, (rows, columns))
    zero = torch.randint(0, 1 << bits, (rows, groups)).float() if kind == "integer" else torch.randn(rows, groups) / 9
    group_of = torch.randint(0, groups, (columns,)) if ordered else None
    return UniformWeight.of(codes, torch.rand(rows, groups) / 9 + 0.01, zero, bits, kind, group_of)


def multiplied(x: torch.Tensor, w: UniformWeight) -> torch.Tensor:
    return uniform_product(x, w.codes, w.scale, w.zero, w.bits, w.kind, w.group_of)


def reference(w: UniformWeight) -> torch.Tensor:
    with forced("off"):
        return w.dequantize()


@needs_kernels
@every_level
@pytest.mark.parametrize("bits", range(1, 9))
def test_equals_the_dequantized_matrix(bits, level):
    torch.manual_seed(bits)
    with forced(level):
        for i, (kind, (columns, groups)) in enumerate(product(("none", "integer", "float"), SHAPES)):
            w = weight(5 + i % 4, columns, groups, bits, kind)
            values = reference(w)
            assert torch.equal(uniform_values(columns, w.codes, w.scale, w.zero, bits, kind), values)
            for count, dtype in ((1, torch.float32), (2, torch.bfloat16), (7, torch.float32)):
                x = torch.randn(count, columns).to(dtype)
                found = multiplied(x, w)
                assert found.dtype == dtype
                assert_product(found, x, values)


@needs_kernels
@settings(deadline=None, max_examples=60)
@given(
    bits=st.integers(1, 8), kind=st.sampled_from(["none", "integer", "float"]), groups=st.integers(1, 20),
    width=st.integers(1, 150), rows=st.integers(1, 40), count=st.integers(1, 9), ordered=st.booleans(),
    level=st.sampled_from(offered() or ("none",)), bf16=st.booleans(), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(bits, kind, groups, width, rows, count, ordered, level, bf16, seed):
    torch.manual_seed(seed)
    w = weight(rows, groups * width, groups, bits, kind, ordered)
    x = (torch.randn(count, groups * width) * 10 ** float(torch.randn(()))).to(
        torch.bfloat16 if bf16 else torch.float32
    )
    with forced(level):
        assert torch.equal(
            uniform_values(groups * width, w.codes, w.scale, w.zero, bits, kind, w.group_of), reference(w)
        )
        found, values = multiplied(x, w), reference(w)
    zeros = (values == 0).all(1)  # their error is in proportion to nothing: codes and zero points take each other away
    assert_product(found[:, ~zeros], x, values[~zeros])
    largest = x.double().abs().amax(-1, keepdim=True) * w.scale[zeros].double().sum(-1) * width * 2**bits
    assert (found[:, zeros].double().abs() <= 2e-7 * largest).all()


@needs_kernels
@every_level
def test_an_outlier_costs_only_its_own_group_precision(level):
    torch.manual_seed(0)
    w = weight(16, 1024, 8, 4, "integer")
    w.codes[:, :64] = 0x88  # the outlier's weights are 0, so that it must not be seen at all
    assert w.zero is not None
    w.zero.fill_(0x88)
    x = torch.randn(1, 1024)
    x[0, 5] = 1e6
    with forced(level):
        found = multiplied(x, w)
    assert_product(found, torch.cat([torch.zeros(1, 128), x[:, 128:]], 1), reference(w), most=1e-6)


@needs_kernels
@every_level
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_infinities_stay(level, value):
    torch.manual_seed(0)
    w = weight(8, 256, 2, 4, "none")
    x = torch.randn(1, 256)
    x[0, 7] = value
    with forced(level):
        assert not multiplied(x, w).isfinite().all()


@needs_kernels
@every_level
@pytest.mark.parametrize("size", [0.0, 1e-38, 1e-30, 1e30])
def test_small_and_large_inputs(level, size):
    torch.manual_seed(0)
    w, x = weight(8, 256, 2, 4, "integer"), torch.randn(3, 256) * size
    with forced(level):
        assert_product(multiplied(x, w), x, reference(w), most=1e-5)


@needs_kernels
@every_level
def test_rows_of_inputs_with_gaps_and_threads(level):
    torch.manual_seed(0)
    w, wide = weight(300, 512, 4, 4, "integer"), torch.randn(5, 600)
    before = torch.get_num_threads()
    with forced(level):
        one = multiplied(wide[:, 40:552], w)
        torch.set_num_threads(3)
        try:
            several = multiplied(wide[:, 40:552], w)
        finally:
            torch.set_num_threads(before)
    assert_product(one, wide[:, 40:552], reference(w))
    assert torch.equal(one, several)
    assert torch.equal(multiplied(torch.zeros(2, 3, 512), w), torch.zeros(2, 3, 300))


@needs_kernels
@every_level
def test_values_of_some_rows_in_bf16(level):
    torch.manual_seed(0)
    w = weight(20, 130, 1, 3, "float")
    with forced(level):
        some = uniform_values(130, w.codes, w.scale, w.zero, 3, "float", dtype=torch.bfloat16, rows=slice(7, 11))
    assert torch.equal(some, reference(w)[7:11].to(torch.bfloat16))
