"""Masked attention against its definition, with gradients; and what is refused rather than ignored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posttrain.models import attention
from posttrain.models.attention import LayerState, attend, attention_forward
from posttrain.models.packing import pack_prompts
from tiny_models import make_policy, ragged_batch


def definition(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    groups = q.shape[1] // k.shape[1]
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k.repeat_interleave(groups, 1)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, v.repeat_interleave(groups, 1))


def example(heads: int, kv: int, value_width: int = 8):
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(3, heads, 5, 8, generator=draw)
    k = torch.randn(3, kv, 9, 8, generator=draw)
    v = torch.randn(3, kv, 9, value_width, generator=draw)
    mask = torch.rand(3, 1, 5, 9, generator=draw) < 0.6
    mask[..., 0] = True
    upstream = torch.randn(3, heads, 5, value_width, generator=draw)
    return (q, k, v), mask, upstream


@pytest.mark.parametrize("long", [4, 1024])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("heads", "kv", "value_width"), [(4, 4, 8), (4, 2, 8), (6, 1, 8), (4, 2, 6)])
def test_attention_and_its_gradients_are_those_of_the_definition(heads, kv, value_width, softcap, long, monkeypatch):
    monkeypatch.setattr(attention, "LONG", long)
    inputs, mask, upstream = example(heads, kv, value_width)
    results = []
    for function in (attend, definition):
        q, k, v = (t.clone().requires_grad_() for t in inputs)
        out = function(q, k, v, mask, 0.3, softcap)
        results.append([out, *torch.autograd.grad(out, (q, k, v), upstream)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_only_what_needs_a_gradient_gets_one():
    inputs, mask, upstream = example(4, 2)
    q, k, v = (t.clone() for t in inputs)
    v.requires_grad_()
    attend(q, k, v, mask, 0.3).backward(upstream)
    other = inputs[2].clone().requires_grad_()
    definition(q, k, other, mask, 0.3).backward(upstream)
    torch.testing.assert_close(v.grad, other.grad, atol=1e-6, rtol=1e-5)


def one_layer(layer: int = 0) -> nn.Module:
    module: Any = nn.Identity()
    module.layer_idx = layer
    return module


def rows(tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 1, 4, tokens, 8, generator=torch.Generator().manual_seed(1))
    return q, k[:, :2], v[:, :2]


def test_packed_rows_need_a_layout():
    with pytest.raises(RuntimeError, match="without a layout"):
        attention_forward(one_layer(), *rows(3), None)


@pytest.mark.parametrize(
    "options",
    [{"s_aux": torch.zeros(4)}, {"position_bias": torch.zeros(1)}, {"attention_mask": torch.zeros(1, 1, 3, 3)}],
)
def test_what_is_not_known_is_refused(options: dict[str, Any]):
    layout = pack_prompts([torch.arange(3)])
    mask = options.pop("attention_mask", None)
    with pytest.raises(NotImplementedError):
        attention_forward(one_layer(), *rows(3), mask, packed_layout=layout, **options)


def test_a_layer_that_attends_twice_is_refused():
    layout = pack_prompts([torch.arange(3)])
    captured: dict[int, LayerState] = {}
    attention_forward(one_layer(1), *rows(3), None, packed_layout=layout, captured=captured)
    assert list(captured) == [1]
    with pytest.raises(NotImplementedError, match="layer 1"):
        attention_forward(one_layer(1), *rows(3), None, packed_layout=layout, captured=captured)


@pytest.mark.parametrize("window", [None, 0, 2])
def test_window_of_a_layer(window):
    """Two prompts in a row, against the definition on each alone."""
    layout = pack_prompts([torch.arange(5), torch.arange(3)])
    captured: dict[int, LayerState] = {}
    query, key, value = rows(8)
    out, _ = attention_forward(
        one_layer(), query, key, value, None, packed_layout=layout, sliding_window=window, captured=captured
    )
    assert captured[0].window == (window or None)
    for part in (slice(0, 5), slice(5, 8)):
        size = part.stop - part.start
        distance = torch.arange(size)[:, None] - torch.arange(size)
        mask = (distance >= 0) & (distance < (window or 99))
        alone = definition(query[:, :, part], key[:, :, part], value[:, :, part], mask[None, None], 8**-0.5)
        torch.testing.assert_close(out[:, part], alone.transpose(1, 2), atol=1e-6, rtol=1e-5)


def test_the_models_own_attention_returns_after_an_error(tiny_tokenizer):
    policy = make_policy("llama", tiny_tokenizer)
    own = policy.model.config._attn_implementation
    names = []

    def fail(*inputs):
        names.append(policy.model.config._attn_implementation)
        raise KeyError("inside")

    assert policy.packs
    policy.model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="inside"):
        policy.log_likelihood(ragged_batch())
    assert names == [attention.NAME]
    assert policy.model.config._attn_implementation == own


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_gradient_checkpointing_computes_the_same_attention_again(name, reentrant, tiny_tokenizer):
    policy, batch = make_policy(name, tiny_tokenizer), ragged_batch()

    def gradients():
        policy.model.zero_grad()
        policy.log_likelihood(batch).logp.sum().backward()
        return [p.grad.clone() for _, p in policy.trainable_parameters() if p.grad is not None]

    expected = gradients()
    policy.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    policy.model.train()
    calls = []
    for layer in policy.model.model.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    found = gradients()
    assert len(calls) == 2 * len(policy.model.model.layers)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
