"""Norms and gated units in C: values and gradients of the plain path, in both dtypes and for ragged widths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from posttrain.native import layers, library
from posttrain.trajectory import PosttrainError

pytestmark = pytest.mark.skipif(library.library() is None, reason="posttrain was built without its C functions")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


def plain_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def close(found: Tensor | None, wanted: Tensor | None) -> bool:
    assert found is not None
    assert wanted is not None
    assert found.dtype == wanted.dtype
    return bool((found.float() - wanted.float()).abs().max() <= TOLERANCE[found.dtype] * wanted.float().abs().max())


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(1, 7, 5), (2, 33, 64), (1, 300, 576)])
def test_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    x = (3 * torch.randn(shape)).to(dtype)
    weight, given = (1 + torch.randn(shape[-1])).to(dtype), torch.randn(shape).to(dtype)
    results = []
    for norm in (layers.rms_norm, plain_norm):
        inputs = [t.clone().requires_grad_() for t in (x, weight)]
        y = norm(*inputs, 1e-5)
        y.backward(given)
        results.append((y, *(t.grad for t in inputs)))
    assert all(close(found, wanted) for found, wanted in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", [(1, 7, 5), (1, 300, 1536)])
def test_gated(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    gate, up, given = ((8 * torch.randn(shape)).to(dtype) for _ in range(3))
    results = []
    for unit in (layers.gated, lambda g, u: torch.nn.functional.silu(g) * u):
        inputs = [t.clone().requires_grad_() for t in (gate, up)]
        y = unit(*inputs)
        y.backward(given)
        results.append((y, *(t.grad for t in inputs)))
    assert all(close(found, wanted) for found, wanted in zip(*results, strict=True))


def test_extreme_gates_are_finite() -> None:
    gate = torch.tensor([[-1e30, -100.0, -88.0, 0.0, 88.0, 100.0, 1e30]], requires_grad=True)
    y = layers.gated(gate, torch.ones(1, 7))
    y.sum().backward()
    wanted = torch.nn.functional.silu(gate)
    assert torch.allclose(y, wanted, rtol=1e-6, atol=1e-30)
    assert gate.grad is not None
    assert torch.isfinite(gate.grad).all()


def test_one_thread_and_two_agree() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(400, 128), torch.randn(128)
    before = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(layers.rms_norm(x, weight, 1e-6))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_the_environment_names_a_level_that_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, found in (("off", None), ("portable", "portable")):
        monkeypatch.setenv(library.VARIABLE, asked)
        assert library.level.__wrapped__() == found
    monkeypatch.setenv(library.VARIABLE, "fast")
    with pytest.raises(PosttrainError, match="'fast'; expected off, portable"):
        library.level.__wrapped__()


def test_a_missing_library_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library", lambda: None)
    monkeypatch.delenv(library.VARIABLE, raising=False)
    with pytest.warns(UserWarning, match="without its functions in C"):
        assert library.level.__wrapped__() is None
