"""A packed matrix with an adapter beside it."""

from __future__ import annotations

import pytest
import torch

from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.packed.low_rank import LowRankWeight
from posttrain.compress.packed.weight import from_written, written
from posttrain.compress.solvers.rtn import rounded


def test_bits_values_products_and_files() -> None:
    torch.manual_seed(0)
    base = rounded(torch.randn(48, 128), Uniform(3, 64), "w")
    up, down = torch.randn(48, 5).half(), torch.randn(5, 128).half()
    made = LowRankWeight.of(base, up, down)
    assert made.counted_bits == base.counted_bits + 16 * 5 * (48 + 128)
    assert made.counted_bits == pytest.approx(made.stored_bytes * 8, rel=0.03)
    whole = base.dequantize() + up.float() @ down.float()
    torch.testing.assert_close(made.dequantize(), whole)
    x = torch.randn(2, 3, 128)
    assert torch.allclose(made.product(x), x @ whole.T, atol=1e-3)
    other = from_written(written(made))
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.dequantize(), made.dequantize())
