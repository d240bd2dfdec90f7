"""LLM.int8()'s inputs: two limits, an example by hand, and what an outlier changes."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain.compress.activations.dynamic import Dynamic
from posttrain.compress.activations.outliers import OutlierColumns, OutlierColumnsStep
from posttrain.compress.packed import inputs as steps
from posttrain.trajectory import PosttrainError


def test_without_a_threshold_nothing_is_rounded_and_with_none_in_reach_all_is() -> None:
    x = 4 * torch.randn(3, 5, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(OutlierColumns(8, 0.0).fit(None, 16, "x")(x), x)
    assert torch.equal(OutlierColumns(8, math.inf).fit(None, 16, "x")(x), Dynamic(8).fit(None, 16, "x")(x))


def test_by_hand() -> None:
    """Channel 1 holds an outlier in the second token: both tokens keep it, and it takes no part in their ranges."""
    step = OutlierColumns(3, 6.0).fit(None, 3, "x")  # codes up to 3
    found = step(torch.tensor([[3.0, 2.5, 1.4], [0.6, -7.0, -0.3]]))
    # ranges 3 and 0.6: steps 1 and 0.2
    assert torch.allclose(found, torch.tensor([[3.0, 2.5, 1.0], [0.6, -7.0, -0.4]]), atol=1e-6)


def test_what_a_token_is_rounded_to_depends_on_its_company() -> None:
    step = OutlierColumnsStep(2)
    alone, beside = torch.tensor([[1.0, 0.333]]), torch.tensor([[1.0, 0.333], [9.0, 0.0]])
    assert not torch.equal(step(alone)[0], step(beside)[0])
    assert step(beside)[0, 0] == 1.0


def test_dtype_nothing_and_back_from_a_description() -> None:
    step = OutlierColumnsStep(4, 6, 2.0)
    x = torch.randn(2, 4).to(torch.bfloat16)
    assert step(x).dtype == torch.bfloat16
    assert step(torch.empty(0, 4)).shape == (0, 4)
    chain = steps.from_written(steps.written(steps.chain([step])))
    assert chain is not None
    assert torch.equal(chain(x), step(x))
    with pytest.raises(PosttrainError, match="threshold is -1"):
        OutlierColumns(8, -1)
