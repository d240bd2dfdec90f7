"""Mamba mixers taken apart: the same computation, with caches and gradients, and put together again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from conftest import make_tokenizer
from posttrain.models.mixers import Mixer, apart, scan, take_apart
from posttrain.rollout.plain import PlainEngine
from posttrain.trajectory import PosttrainError, Prompt, Sampling
from tiny_models import make_policy

TOKENS = torch.randint(0, 60, (3, 11), generator=torch.Generator().manual_seed(0))


def model(**overrides: Any) -> Any:
    return make_policy("mamba", make_tokenizer(), **overrides).model


@torch.no_grad()
def logits(found: Any, **given: Any) -> torch.Tensor:
    return found(input_ids=TOKENS, use_cache=False, **given).logits


@pytest.mark.limit("quamba")
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("overrides", [{}, {"use_conv_bias": False, "conv_kernel": 2}, {"use_bias": True}])
def test_the_logits_are_the_models_own(padded: bool, overrides: dict[str, Any]) -> None:
    found = model(**overrides)
    mask = (torch.arange(11) < torch.tensor([[11], [7], [4]])).long() if padded else None
    before = logits(found, attention_mask=mask)
    stood = take_apart(found)
    assert list(stood) == [f"backbone.layers.{i}.mixer" for i in range(2)]
    seen = mask[..., None].bool().expand_as(before) if mask is not None else torch.ones_like(before, dtype=torch.bool)
    torch.testing.assert_close(logits(found, attention_mask=mask)[seen], before[seen], atol=1e-5, rtol=1e-5)
    assert take_apart(found) == {}


def test_every_layer_is_called_and_every_place_seen() -> None:
    found = model()
    take_apart(found)
    mixer = found.backbone.layers[0].mixer
    called: list[str] = []
    for name in ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"):
        mixer.get_submodule(name).register_forward_hook(lambda *given, name=name: called.append(name))
    seen: dict[str, list[torch.Tensor]] = {}
    mixer.watch = lambda place, tensor: seen.setdefault(place, []).append(tensor)
    logits(found)
    assert called == ["in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"]
    shapes = {place: (len(parts), tuple(parts[0].shape)) for place, parts in seen.items()}
    assert shapes == {
        "projected": (1, (3, 11, 96)), "scanned": (1, (3, 11, 48)), "selected": (1, (3, 11, 10)),
        "steps": (1, (3, 11, 48)), "state": (11, (3, 48, 4)),
    }  # fmt: skip


def test_the_scan_is_the_recurrence() -> None:
    draw = torch.Generator().manual_seed(0)
    x, steps = torch.randn(2, 5, 3, generator=draw), torch.rand(2, 5, 3, generator=draw)
    a, b, c = -torch.rand(3, 2, generator=draw), *torch.randn(2, 2, 5, 2, generator=draw)
    found, last = scan(x, steps, a, b, c)
    for row in range(2):
        for channel in range(3):
            state = torch.zeros(2)
            for t in range(5):
                step = steps[row, t, channel]
                state = torch.exp(step * a[channel]) * state + step * b[row, t] * x[row, t, channel]
                assert float(found[row, t, channel]) == pytest.approx(float(state @ c[row, t]), abs=1e-5)
            assert torch.allclose(last[row, channel], state, atol=1e-5)
    first, middle = scan(x[:, :2], steps[:, :2], a, b[:, :2], c[:, :2])
    rest, end = scan(x[:, 2:], steps[:, 2:], a, b[:, 2:], c[:, 2:], middle)
    torch.testing.assert_close(torch.cat([first, rest], 1), found)
    torch.testing.assert_close(end, last)


def test_what_is_rounded_is_what_is_handed_on() -> None:
    found = model()
    take_apart(found)
    before = logits(found)

    class Zero(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x)

    for place in ("projected", "scanned", "selected", "steps", "state"):
        found.backbone.layers[0].mixer.rounding[place] = Zero()
        assert not torch.allclose(logits(found), before, atol=1e-4), place
        del found.backbone.layers[0].mixer.rounding[place]
    assert torch.equal(logits(found), before)


@pytest.mark.parametrize("prompt", [1, 2, 7])  # shorter than the convolution, and longer
def test_decoding_by_the_cache_is_reading_the_whole_text(prompt: int) -> None:
    policy = make_policy("mamba", make_tokenizer())
    whole = PlainEngine(policy).generate([Prompt(TOKENS[0, :prompt])], 2, Sampling(max_tokens=8), seed=1)
    take_apart(policy.model)
    found = PlainEngine(policy).generate([Prompt(TOKENS[0, :prompt])], 2, Sampling(max_tokens=8), seed=1)
    for one, other in zip(found[0], whole[0], strict=True):
        assert torch.equal(one.tokens, other.tokens)
        torch.testing.assert_close(one.logp_full, other.logp_full, atol=1e-4, rtol=1e-4)


def test_gradients_are_the_models_own_and_what_is_learned_stays() -> None:
    one, other = model(), model()
    take_apart(other)
    for each in (one, other):
        each.train()
        each(input_ids=TOKENS, use_cache=False, labels=TOKENS).loss.backward()
    names = {n.replace("dt_proj.bias", "dt_bias"): p for n, p in one.named_parameters()}
    for name, parameter in other.named_parameters():
        assert torch.allclose(parameter.grad, names[name].grad, atol=1e-5), name
    before = logits(one.eval())
    with apart(one):
        assert isinstance(one.backbone.layers[0].mixer, Mixer)
        with torch.no_grad():
            for parameter in one.backbone.layers[0].mixer.parameters():
                parameter.mul_(1.1)
        changed = logits(one)
    assert type(one.backbone.layers[0].mixer).__name__ == "MambaMixer"
    assert not torch.allclose(changed, before, atol=1e-3)
    torch.testing.assert_close(logits(one), changed, atol=1e-5, rtol=1e-5)


def test_mixers_with_a_norm_more_are_refused_and_the_model_stays_as_it_was() -> None:
    import transformers as hf

    torch.manual_seed(0)
    config = hf.FalconMambaConfig(vocab_size=60, hidden_size=32, state_size=4, num_hidden_layers=1)
    found = hf.FalconMambaForCausalLM(config).eval()
    names = [type(m).__name__ for m in found.modules()]
    with pytest.raises(PosttrainError, match=r"mixer \(FalconMambaMixer\) computes something else than a Mamba mixer"):
        take_apart(found)
    assert [type(m).__name__ for m in found.modules()] == names
