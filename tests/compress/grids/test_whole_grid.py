"""One scale a matrix."""

from __future__ import annotations

import pytest
import torch

from posttrain.compress.grids.whole import WholeMatrix
from posttrain.compress.solvers.rtn import rounded
from posttrain.trajectory import PosttrainError


@pytest.mark.limit("quamba")
def test_values_are_those_of_the_largest_weight_of_all() -> None:
    weight = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, 48)[:, None]
    found = rounded(weight, WholeMatrix(6), "w")
    scale = (weight.abs().max() / 31).half().float()
    assert torch.allclose(found.dequantize(), torch.round(weight / scale) * scale, atol=1e-6)
    assert found.counted_bits == found.stored_bytes * 8 == 48 * (64 * 6 + 16)


def test_a_group_makes_no_sense() -> None:
    with pytest.raises(PosttrainError, match="a grid of one scale with group 32 and clip 'none'; expected group 0"):
        WholeMatrix(8, 32)
