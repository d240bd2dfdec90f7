"""The uniform format: bytes are those of the formula, values those of the codes."""

from __future__ import annotations

import pytest
import torch

from posttrain.compress.grids.uniform import Uniform, Zero
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.packed.weight import from_written, written
from posttrain.compress.solvers.rtn import rounded
from posttrain.trajectory import PosttrainError


def normal(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("zero", ["none", "integer", "float"])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("group", [64, 0])
def test_bytes_are_those_of_the_formula(bits: int, zero: Zero, group: int) -> None:
    held = rounded(normal(96, 512), Uniform(bits, group, zero), "w")
    assert held.stored_bytes * 8 == pytest.approx(held.counted_bits, rel=0.03)
    beside = {"none": 16, "integer": 16 + bits, "float": 32}[zero]
    assert held.bits_per_weight == pytest.approx(bits + beside / (group or 512))


def test_groups_that_are_no_runs_of_columns() -> None:
    levels = torch.tensor([[1.0, 2.0]])
    codes, zero = torch.tensor([[1, 0, 3, 2]]), torch.tensor([[0.0, 1.0]])
    held = UniformWeight.of(codes, levels, zero, 2, "integer", torch.tensor([0, 1, 1, 0]))
    assert held.dequantize().tolist() == [[1.0, -2.0, 4.0, 2.0]]
    assert held.counted_bits == 4 * 2 + 2 * (16 + 2) + 4 * 16
    large = UniformWeight.empty((64, 512), bits=4, groups=4, zero="none", ordered=True)
    assert large.stored_bytes * 8 == large.counted_bits


@pytest.mark.parametrize("zero", ["none", "integer", "float"])
def test_a_description_and_a_state_make_it_again(zero: Zero) -> None:
    held = rounded(normal(8, 48), Uniform(3, 16, zero), "w")
    again = from_written(written(held))
    again.load_state_dict(held.state_dict())
    assert torch.equal(again.dequantize(), held.dequantize())
    assert (again.shape, again.counted_bits) == (held.shape, held.counted_bits)


def test_a_product_is_that_of_the_values() -> None:
    held, x = rounded(normal(8, 48), Uniform(4, 16), "w"), normal(5, 48, 1)
    assert torch.allclose(held.product(x), x @ held.dequantize().T, atol=1e-6)
    assert held.product(x.bfloat16()).dtype == torch.bfloat16


def test_a_format_that_there_is_not() -> None:
    with pytest.raises(PosttrainError, match="unknown weight format 'unifrom'; did you mean uniform"):
        from_written({"format": "unifrom", "shape": [1, 1]})
