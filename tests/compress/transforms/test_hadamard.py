"""Hadamard matrices: orthogonal, of the orders that models have, and multiplied fast."""

from __future__ import annotations

import pytest
import torch

from posttrain.compress.transforms.hadamard import HadamardStep, across, exists, hadamard, multiplied
from posttrain.trajectory import PosttrainError

ORDERS = [1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 40, 44, 48, 52, 60, 64, 76, 96, 100, 108, 140, 148, 192, 344, 576]


@pytest.mark.parametrize("order", ORDERS)
def test_rows_are_orthogonal_and_entries_are_signs(order: int) -> None:
    matrix = hadamard(order)
    assert torch.equal(matrix.abs(), torch.ones(order, order, dtype=torch.float64))
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize("order", [1, 2, 8, 12, 20, 28, 36, 48, 576])
def test_the_fast_product_is_the_product(order: int) -> None:
    x = torch.randn(3, 5, order, dtype=torch.float64)
    assert torch.allclose(multiplied(x), x @ hadamard(order).T / order**0.5, atol=1e-12)


def test_a_layer_reads_the_product_with_its_rows_multiplied() -> None:
    # of order 12 the matrix is not symmetric: W H would be wrong where W H^T is right
    x, weight = torch.randn(7, 12, dtype=torch.float64), torch.randn(5, 12, dtype=torch.float64)
    assert torch.allclose(multiplied(x) @ multiplied(weight).T, x @ weight.T, atol=1e-12)
    assert not torch.equal(hadamard(12), hadamard(12).T)


def test_across_heads() -> None:
    x = torch.randn(2, 3 * 4, dtype=torch.float64)
    mixed = torch.einsum("hk,bkd->bhd", hadamard(4) / 2, x.view(2, 4, 3))
    assert torch.allclose(across(x, 4), mixed.reshape(2, 12), atol=1e-12)


@pytest.mark.parametrize("width", [1024, 1536, 2048, 4096, 4864, 5120, 8192, 8960, 11008, 13824, 14336, 18944, 28672])
def test_widths_of_models_exist(width: int) -> None:
    assert exists(width)


@pytest.mark.parametrize("order", [0, 3, 6, 9, 18, 92])
def test_orders_that_are_not_known(order: int) -> None:
    assert not exists(order)
    with pytest.raises(PosttrainError, match=rf"order {order} is known here.*such as"):
        hadamard(order)


def test_the_step_keeps_dtype_and_shape() -> None:
    x = torch.randn(2, 3, 24, dtype=torch.bfloat16)
    for step in (HadamardStep(24), HadamardStep.empty(24, **HadamardStep(24, 4).settings())):
        assert (out := step(x)).shape == x.shape
        assert out.dtype == x.dtype
    assert torch.allclose(HadamardStep(24, 4)(x.float()), across(x.float(), 4))
    with pytest.raises(PosttrainError, match="order 9"):
        HadamardStep(27, 9)
