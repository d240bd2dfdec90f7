"""Rounded attention: what is rounded is what is multiplied, nothing else, and a folder keeps it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from block_models import batches_of, logits, model_of
from conftest import make_tokenizer
from posttrain import load
from posttrain.compress.activations.dynamic import Dynamic
from posttrain.compress.activations.percentile import Percentile
from posttrain.compress.activations.probabilities import Logarithm, Tangent
from posttrain.compress.activations.quantizer import Activations
from posttrain.compress.method import Compression
from posttrain.compress.pipeline import compress_model
from posttrain.compress.policy import CompressedPolicy, compressed_copy
from posttrain.compress.rounded_attention import AttentionRounding, RoundedAttention, operands
from posttrain.compress.solvers.unchanged import Unchanged
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.engine_choice import engine_for
from posttrain.rollout.plain import PlainEngine
from posttrain.trajectory import PosttrainError, Prompt, Sampling
from tiny_models import make_policy


def attention_alone(part: RoundedAttention) -> Compression:
    return Compression("attention", Unchanged(), attention=part)


@pytest.mark.limit("dopq-vit", "repquant")
@pytest.mark.parametrize("name", ["vit", "bert", "llama", "opt", "gpt-neox", "gemma"])
def test_many_bits_change_nothing(name: str) -> None:
    model = model_of(name)
    batches = batches_of(model)
    with torch.no_grad():
        before = [model(**batch).logits for batch in batches]
        part = RoundedAttention(Percentile(16, quantiles=(1.0,)), Percentile(16, quantiles=(1.0,)))
        compress_model(model, attention_alone(part), batches)
        after = [model(**batch).logits for batch in batches]
    assert sum(isinstance(m, AttentionRounding) for m in model.modules()) == 2
    assert all((a - b).abs().max() < 2e-3 * b.abs().max() for a, b in zip(after, before, strict=True))
    assert not torch.equal(after[0], before[0])


@pytest.mark.limit("dopq-vit")
def test_what_is_multiplied_is_rounded() -> None:
    """A ViT's first attention, computed here from its projections with the steps that were fitted."""
    model: Any = model_of("vit")
    compress_model(model, attention_alone(RoundedAttention(Percentile(4), Tangent(4))), batches_of(model))
    attention = model.vit.layers[0].attention
    x = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(1))
    rounding = attention.attention_rounding
    assert set(rounding.steps) == {"query", "key", "probabilities", "value"}

    def heads(layer: Any, operand: str) -> Tensor:
        return rounding(operand, layer(x).view(2, 10, 4, 8).transpose(1, 2))

    q, k, v = (heads(getattr(attention, f"{n}_proj"), o) for n, o in (("q", "query"), ("k", "key"), ("v", "value")))
    weights = rounding("probabilities", (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1))
    wanted = attention.o_proj((weights @ v).transpose(1, 2).reshape(2, 10, 32))
    found, shown = attention(x)
    torch.testing.assert_close(found, wanted)
    assert torch.equal(shown, weights)
    assert len(shown.unique()) <= 16
    assert not torch.allclose(shown.sum(-1), torch.ones(2, 4, 10), atol=1e-3)


def test_statistics_are_those_of_the_operands() -> None:
    model: Any = model_of("vit")
    (module, met), _ = operands(model, batches_of(model), {"query": 8, "probabilities": 100})
    assert module is model.vit.layers[0].attention
    with torch.no_grad():
        x = [model.vit.layers[0].layernorm_before(model.vit.embeddings(b["pixel_values"])) for b in batches_of(model)]
        q, k = (torch.cat([getattr(module, f"{n}_proj")(h) for h in x]).view(6, 10, 4, 8).transpose(1, 2) for n in "qk")
    assert float(met["query"].absmax.max()) == pytest.approx(float(q.abs().max()), rel=1e-5)
    assert met["query"].count == 6 * 4 * 10
    maps = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
    assert float(met["probabilities"].maximum) == pytest.approx(float(maps.max()), rel=1e-4)
    assert met["probabilities"].count == maps.numel()


@pytest.mark.parametrize("levels", [Percentile(4), Logarithm(4), Tangent(4)])
def test_what_a_token_may_not_see_stays_0(levels: Activations) -> None:
    model: Any = model_of("llama")
    compress_model(model, attention_alone(RoundedAttention(None, levels)), batches_of(model))
    maps: list[Tensor] = []
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(lambda module, given, out: maps.append(out[1]))
    logits(model)
    assert len(maps) == 2
    for shown in maps:
        assert (shown.triu(1) == 0).all()
        assert (shown[..., 0, 0] > 0.9).all()


def test_calibration_leaves_no_trace_and_fewer_bits_lose_more() -> None:
    model: Any = model_of("vit")
    before = model.config._attn_implementation
    operands(model, batches_of(model), {"query": 1})
    assert model.config._attn_implementation == before
    truth, errors = logits(model), []
    for bits in (3, 6):
        model = model_of("vit")
        compress_model(model, attention_alone(RoundedAttention(Percentile(bits), Tangent(bits))), batches_of(model))
        errors.append(float((logits(model) - truth).norm()))
    assert errors[1] < 0.4 * errors[0]


def small_of(policy: CausalPolicy) -> CompressedPolicy:
    tokens = torch.randint(3, 60, (4, 24), generator=torch.Generator().manual_seed(0))
    part = RoundedAttention(Percentile(6), Logarithm(4))
    return compressed_copy(policy, attention_alone(part), [{"input_ids": tokens, "use_cache": False}])


def test_a_language_model_is_read_decoded_and_kept_with_rounded_attention(tmp_path: Path) -> None:
    """Packed rows know nothing of it: the policy computes padded, by the model's own attention."""
    policy = make_policy("llama", make_tokenizer())
    small = small_of(policy)
    assert policy.packs
    assert not small.packs
    engine = engine_for(small)
    assert isinstance(engine, PlainEngine)
    (made,) = engine.generate([Prompt(torch.arange(3, 9))], 1, Sampling(max_tokens=6), seed=0)
    text = torch.cat([torch.arange(3, 9), made[0].tokens])
    with torch.no_grad():
        told = small.model(input_ids=text[None], use_cache=False).logits[0].log_softmax(-1)
    expected = told[range(5, len(text) - 1), text[6:]]
    torch.testing.assert_close(made[0].logp_full, expected, atol=1e-4, rtol=1e-4)
    again = load(str(small.save(tmp_path / "small")), precision="fp32")
    with torch.no_grad():
        assert torch.equal(again.model(input_ids=text[None]).logits, small.model(input_ids=text[None]).logits)
    wide = load(str(tmp_path / "small"), precision="bf16")
    steps = {b.dtype for n, b in wide.model.named_buffers() if "attention_rounding" in n}
    assert steps == {torch.float32}


def test_mistakes_are_told() -> None:
    with pytest.raises(PosttrainError, match="nothing of attention is rounded"):
        RoundedAttention(None, None)
    with pytest.raises(PosttrainError, match="attends in a way of its own, or not at all"):
        compress_model(model := model_of("mamba"), attention_alone(RoundedAttention()), batches_of(model))
    with pytest.raises(PosttrainError, match="attention cannot be rounded: attention sinks"):
        compress_model(model := model_of("gpt-oss"), attention_alone(RoundedAttention()), batches_of(model))
    assert not RoundedAttention(Dynamic(8), None).uses_data
