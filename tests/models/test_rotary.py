"""The row-wise rotary positions stand in for a model's own only where both compute the same."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import make_model, make_tokenizer
from posttrain.models import rotary
from posttrain.models.attention import packed_attention
from posttrain.models.causal import CausalPolicy
from posttrain.models.rotary import NAME, rotating, rotations
from posttrain.native import layers, library
from posttrain.objective.batch import Batch
from posttrain.trajectory import Group, Trajectory

pytestmark = pytest.mark.skipif(library.library() is None, reason="posttrain was built without its C functions")


def home_of(model: Any) -> Any:
    return sys.modules[type(model).__module__]


def plain(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat((-second, first), -1) * sin[:, None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "rows", "width"), [(1, 1, 2), (3, 7, 10), (9, 130, 64)])
def test_values_and_gradients_are_those_of_torch(dtype: torch.dtype, heads: int, rows: int, width: int) -> None:
    """Bit for bit, whichever way the numbers lie: it rounds where the plain path rounds."""
    torch.manual_seed(0)
    cos, sin = (torch.randn(1, rows, width).to(dtype) for _ in range(2))
    for x in (torch.randn(1, heads, rows, width), torch.randn(1, rows, heads, width).transpose(1, 2)):
        given, results = torch.randn(1, heads, rows, width).to(dtype), []
        for function in (layers.rotated, plain):
            inputs = x.to(dtype, copy=True).requires_grad_()
            y = function(inputs, cos, sin)
            y.backward(given)
            results.append((y, inputs.grad))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_models_function_is_replaced_inside_the_block_alone() -> None:
    model = make_model()
    own = getattr(home_of(model), NAME)
    with packed_attention(model):
        inside = getattr(home_of(model), NAME)
        assert inside is not own
        with packed_attention(make_model()):  # of the same classes: it is there already
            assert getattr(home_of(model), NAME) is inside
        assert getattr(home_of(model), NAME) is inside
    assert getattr(home_of(model), NAME) is own
    with pytest.raises(KeyError), packed_attention(model):
        raise KeyError
    assert getattr(home_of(model), NAME) is own


def test_what_it_cannot_take_goes_to_the_models_own() -> None:
    model = make_model()
    own = getattr(home_of(model), NAME)
    q, k, cos = torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4), torch.randn(2, 5, 4)
    with rotating(rotations(model)):
        found = getattr(home_of(model), NAME)(q, k, cos, cos)
        wide = getattr(home_of(model), NAME)(q.transpose(1, 2), k.transpose(1, 2), cos, cos, unsqueeze_dim=2)
    wanted = own(q, k, cos, cos)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(torch.equal(a.transpose(1, 2), b) for a, b in zip(wide, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 5])
def test_a_decode_step_is_that_of_the_model(dtype: torch.dtype, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token of each of several rows, as they lie in memory after the products."""
    torch.manual_seed(0)
    model, taken = make_model(), []
    own = getattr(home_of(model), NAME)
    q, k = (torch.randn(rows, 1, heads, 8).to(dtype).transpose(1, 2) for heads in (3, 2))
    cos, sin = (torch.randn(rows, 1, 8).to(dtype) for _ in range(2))
    with rotating(rotations(model)):
        monkeypatch.setattr(rotary.layers, "rotated", lambda *a, f=layers.rotated: taken.append(1) or f(*a))
        found = getattr(home_of(model), NAME)(q, k, cos, sin)
    assert len(taken) == 2
    for a, b in zip(found, own(q, k, cos, sin), strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b)


def test_a_function_that_computes_something_else_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()

    def in_turn(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        """Pairs of neighbours, as in GLM."""
        return tuple(
            x * cos[:, None] + torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2) * sin[:, None] for x in (q, k)
        )

    def other(q: Tensor, position: int) -> Tensor:
        return q * position

    for function in (in_turn, other):
        monkeypatch.setattr(home_of(model), NAME, function)
        assert rotations(model) == []
    monkeypatch.undo()
    assert len(rotations(model)) == 1
    with library.switched_off():
        assert rotations(model) == []


def test_a_policy_computes_the_same_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    policy = CausalPolicy(make_model().bfloat16().train(), make_tokenizer(), "tiny")
    batch = Batch.of([Group([Trajectory(torch.randint(3, 40, (n,)), torch.arange(n) > 2)]) for n in (9, 30)])

    def run() -> list[Tensor]:
        policy.model.zero_grad()
        logp = policy.log_likelihood(batch).logp
        logp.sum().backward()
        return [logp.detach(), *(p.grad.clone() for p in policy.model.parameters() if p.grad is not None)]

    calls = []
    monkeypatch.setattr(rotary.layers, "rotated", lambda *a, f=layers.rotated: calls.append(1) or f(*a))
    found, taken = run(), len(calls)
    monkeypatch.setattr("posttrain.models.attention.rotations", lambda _: [])
    wanted = run()
    assert taken == len(calls) > 0
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
