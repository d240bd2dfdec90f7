"""Linear layers with packed weights give the plain product's output, and never that of a weight that is no more."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conftest import make_model, make_tokenizer
from posttrain.models import packed_linear
from posttrain.models.causal import CausalPolicy
from posttrain.models.packed_linear import BYTES, FEW, STEPS, available, packed_linears, takes
from posttrain.objective.logprob import Head
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.trajectory import Prompt, Sampling

pytestmark = pytest.mark.skipif(not available(), reason="this PyTorch has no products with packed weights")


def linear(*, bias: bool = False, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(48, 40, bias=bias, dtype=dtype)


def close(found: Tensor, wanted: Tensor) -> bool:
    """Up to the rounding of one sum to bf16."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    return bool((found.float() - wanted.float()).abs().max() <= 2**-7 * wanted.float().abs().max())


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every product with a packed weight."""
    rows: list[int] = []
    product = packed_linear._product

    def counted(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        rows.append(inputs.numel() // inputs.shape[-1])
        return product(inputs, weight, bias)

    monkeypatch.setattr(packed_linear, "_product", counted)
    return rows


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 3, 64, FEW, FEW + 1])
def test_products_are_the_plain_ones(packed: list[int], rows: int, bias: bool) -> None:
    layer, x = linear(bias=bias), torch.randn(rows, 1, 48).bfloat16()
    with torch.inference_mode(), packed_linears(layer, Head(layer.weight), STEPS) as head:
        found, logits = layer(x), head.logits(x[:, 0])
        few = rows <= FEW
        assert packed == ([rows, rows] if few else [])
    assert close(found, layer(x).detach())
    assert close(logits, Head(layer.weight).logits(x[:, 0]).detach())
    assert "forward" not in layer.__dict__


@pytest.mark.parametrize("write", ["in place", "other memory", "other parameter"])
def test_a_weight_that_was_written_to_is_read_anew(packed: list[int], write: str) -> None:
    layer, x = linear(), torch.randn(5, 48).bfloat16()
    other = torch.randn(40, 48).bfloat16()
    with torch.no_grad(), packed_linears(layer, Head(layer.weight), STEPS) as head:
        layer(x), head.logits(x)
        assert len(packed) == 2
        if write == "in place":
            layer.weight.copy_(other)
        elif write == "other memory":
            layer.weight.data = other
        else:
            layer.weight = nn.Parameter(other)
        assert torch.equal(layer(x), F.linear(x, other))
        assert len(packed) == 2
        if write != "other parameter":  # the head keeps the one that it was made of
            assert torch.equal(head.product(x), x @ other.T)


def test_gradients_are_those_of_the_plain_layer(packed: list[int]) -> None:
    layer, x = linear(), torch.randn(5, 48).bfloat16()
    with packed_linears(layer, Head(layer.weight), STEPS):
        layer(x).float().square().sum().backward()
    assert packed == []
    assert layer.weight.grad is not None


def test_what_cannot_be_packed_stays_as_it_is() -> None:
    with torch.inference_mode():
        made_here = torch.randn(4, 4).bfloat16()
    for weight in (torch.randn(4, 4), torch.randn(4, 4).bfloat16().T[:, 1:], torch.randn(4).bfloat16(), made_here):
        assert not takes(weight)
    layer = linear(dtype=torch.float32)
    with packed_linears(layer, Head(layer.weight), STEPS) as head:
        assert "forward" not in layer.__dict__
        assert head.packed is None


def test_short_calls_are_not_worth_it() -> None:
    layer = linear()
    with packed_linears(layer, Head(layer.weight), STEPS - 1) as head:
        assert "forward" not in layer.__dict__
        assert head.packed is None


def test_copies_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert BYTES == 2 << 30
    layers = nn.Sequential(*(linear() for _ in range(3)))
    monkeypatch.setattr(packed_linear, "BYTES", 2 * layers[0].weight.nbytes)
    with packed_linears(layers, Head(linear().weight), STEPS) as head:
        assert ["forward" in layer.__dict__ for layer in layers] == [True, True, False]
        assert head.packed is None
    with packed_linears(layers, Head(layers[0].weight), STEPS) as head:
        assert head.packed is not None  # a tied one takes no more


def test_without_the_operations_all_is_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object) -> Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    monkeypatch.setattr(packed_linear, "_product", missing)
    assert not packed_linear._works.__wrapped__()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert not available()


def test_the_engine_sees_every_update_of_the_weights(packed: list[int]) -> None:
    """A call after an update draws, to the bit, what an engine draws that has seen no other weights."""
    torch.manual_seed(0)
    policy = CausalPolicy(make_model().bfloat16(), make_tokenizer(), "tiny")
    sampling, prompts = Sampling(max_tokens=2 * STEPS), [Prompt(torch.arange(3, 8), key=0)]

    def drawn(by: EmbeddedEngine) -> list[tuple[list[int], list[float]]]:
        packed.clear()
        found = by.generate(prompts, 4, sampling, seed=0)[0]
        assert packed
        return [(c.tokens.tolist(), c.logp.tolist()) for c in found]

    engine = EmbeddedEngine(policy)
    before = drawn(engine)
    with torch.no_grad():
        for p in policy.model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    after = drawn(engine)
    assert after != before
    assert after == drawn(EmbeddedEngine(CausalPolicy(copy.deepcopy(policy.model), policy.tokenizer, "tiny")))
