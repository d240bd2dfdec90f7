"""Packed rows give the model's own log-probabilities and gradients, for every architecture; others fall back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.models import packing
from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.objective.likelihood import Likelihood
from posttrain.trajectory import Group, PosttrainError, Trajectory
from tiny_models import (
    ARCHITECTURES,
    PACKING,
    continued,
    make_policy,
    plain_log_likelihood,
    ragged_batch,
    ragged_groups,
    random_tokens,
)


def gradients(policy: CausalPolicy, logp: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of a random weighting of the log-probabilities."""
    weight = torch.randn(len(logp), generator=torch.Generator().manual_seed(7))
    policy.model.zero_grad()
    (weight * logp).sum().backward()
    return {n: p.grad.clone() for n, p in policy.trainable_parameters() if p.grad is not None}


def assert_same_computation(policy: CausalPolicy, batch: Batch, temperature: float = 1.0) -> None:
    expected = plain_log_likelihood(policy, batch, temperature)
    truth = gradients(policy, expected)
    found = policy.log_likelihood(batch, temperature=temperature).logp
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    got = gradients(policy, found)
    assert got.keys() == truth.keys()
    scale = max(float(g.abs().max()) for g in truth.values())
    for name, gradient in got.items():
        assert torch.allclose(gradient, truth[name], atol=1e-5 * scale, rtol=1e-4), name


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probabilities_and_gradients_are_the_models_own(name, tiny_tokenizer):
    policy = make_policy(name, tiny_tokenizer)
    assert policy.packs == (name in PACKING)
    assert_same_computation(policy, ragged_batch(), temperature=0.7)


@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_packed_equals_padded_path(name, tiny_tokenizer):
    policy, batch = make_policy(name, tiny_tokenizer), ragged_batch(1)
    packed = policy.log_likelihood(batch, entropy=True)
    policy._packs = False
    padded = policy.log_likelihood(batch, entropy=True)
    torch.testing.assert_close(packed.logp, padded.logp, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(packed.entropy, padded.entropy, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
@pytest.mark.parametrize("scores", [1, 64])
def test_small_buckets_change_nothing(name, scores, tiny_tokenizer, monkeypatch):
    monkeypatch.setattr(packing, "SCORES_PER_BUCKET", scores)
    assert_same_computation(make_policy(name, tiny_tokenizer), ragged_batch())


def test_long_rows_take_the_tiled_kernel_with_the_same_result(tiny_tokenizer, monkeypatch):
    from posttrain.models import attention

    monkeypatch.setattr(attention, "LONG", 8)
    assert_same_computation(make_policy("mistral", tiny_tokenizer), ragged_batch())


@pytest.mark.parametrize("name", ["llama", "gpt-neox", "gemma2"])
def test_lora_models_have_their_own_gradients(name, tiny_tokenizer):
    from posttrain.models.adapters import add_lora

    policy = add_lora(make_policy(name, tiny_tokenizer), rank=2)
    with torch.no_grad():
        for parameter_name, parameter in policy.trainable_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.2, generator=torch.Generator().manual_seed(len(parameter_name)))
    assert all("lora_" in n for n, _ in policy.trainable_parameters())
    assert_same_computation(policy, ragged_batch())


def test_lora_on_values_alone(tiny_tokenizer):
    """The queries of the first layer then need no gradient, while its values do."""
    from posttrain.models.adapters import add_lora

    policy = add_lora(make_policy("llama", tiny_tokenizer), rank=2, target_modules=["v_proj"])
    assert_same_computation(policy, ragged_batch())


@pytest.mark.parametrize("name", ["llama", "mamba"])  # whose states are fp32 in bf16 too
def test_bf16_stays_close(name, tiny_tokenizer):
    policy = make_policy(name, tiny_tokenizer)
    policy.model.to(torch.bfloat16)
    assert policy.packs == (name == "llama")
    batch = ragged_batch()
    with torch.no_grad():
        found, expected = policy.log_likelihood(batch).logp, plain_log_likelihood(policy, batch)
    assert float((found - expected).abs().mean()) < 0.05


def test_states_in_another_precision_than_the_head(tiny_tokenizer):
    """Mamba keeps its residual stream in fp32: scored, compared with a reference and trained as any other."""
    policy = make_policy("mamba", tiny_tokenizer)
    policy.model.to(torch.bfloat16)
    batch = ragged_batch()
    assert policy.hidden_states(batch).dtype == torch.float32
    found = policy.log_likelihood(batch, entropy=True, reference=policy.frozen_copy().log_likelihood(batch))
    assert found.entropy is not None
    assert found.divergence is not None
    assert float(found.divergence.detach().abs().max()) < 1e-3
    (found.logp.sum() + found.entropy.sum()).backward()
    gradients = [p.grad for _, p in policy.trainable_parameters() if p.grad is not None]
    assert len(gradients) > 10
    assert all(bool(torch.isfinite(g).all()) for g in gradients)


def test_attention_of_the_model_is_its_own_again_afterwards(tiny_tokenizer):
    policy = make_policy("llama", tiny_tokenizer)
    before = policy.model.config._attn_implementation
    policy.log_likelihood(ragged_batch())
    assert policy.model.config._attn_implementation == before


def test_probing_leaves_the_modes_of_modules_alone(tiny_tokenizer):
    policy = make_policy("llama", tiny_tokenizer)
    policy.model.train()
    policy.model.model.layers[0].eval()
    modes = [m.training for m in policy.model.modules()]
    assert policy.packs
    assert [m.training for m in policy.model.modules()] == modes


def test_a_window_that_is_not_told_to_attention_does_not_pack(tiny_tokenizer, monkeypatch):
    """A layer that the configuration calls sliding, whose attention is not told the window: the mask would be wrong
    for sequences longer than any probe.
    """
    policy = make_policy("qwen2-window", tiny_tokenizer, sliding_window=40)
    assert make_policy("qwen2-window", tiny_tokenizer, sliding_window=40).packs
    policy.model.model.layers[1].self_attn.sliding_window = None
    assert not policy.packs


def test_chunks_longer_than_the_probe_do_not_pack(tiny_tokenizer):
    policy = make_policy("llama4", tiny_tokenizer, attention_chunk_size=40)
    assert "chunked_attention" in policy.model.config.layer_types
    assert not policy.packs


def test_a_layer_that_does_not_attend_where_others_do_is_not_trusted(tiny_tokenizer):
    """Packed and padded agree on the probe; what that layer does with longer rows is not known."""
    policy = make_policy("llama", tiny_tokenizer)

    class Elsewhere(torch.nn.Module):
        def forward(self, hidden_states: torch.Tensor, **options: object) -> tuple[torch.Tensor, None]:
            return hidden_states, None

    policy.model.model.layers[1].self_attn = Elsewhere()
    assert not policy.packs
    assert_same_computation(policy, ragged_batch())


def test_a_head_of_an_unknown_kind_is_refused(tiny_tokenizer):
    policy = make_policy("llama", tiny_tokenizer)
    policy.model.lm_head.register_forward_hook(lambda module, inputs, output: output * 2)
    with pytest.raises(PosttrainError, match="changes its logits in a way that is not known"):
        policy.log_likelihood(ragged_batch())


def test_too_long_a_sequence_is_a_one_line_error(tiny_tokenizer):
    policy = make_policy("llama", tiny_tokenizer)
    tokens = torch.arange(65) % 60
    batch = Batch.of([Group([Trajectory(tokens, torch.arange(65) >= 3)])])
    with pytest.raises(PosttrainError, match="65 tokens exceeds the model's context of 64"):
        policy.log_likelihood(batch)


def test_full_vocabulary_divergence_to_itself_is_zero_and_to_another_is_exact(tiny_tokenizer):
    policy, other = make_policy("llama", tiny_tokenizer), make_policy("llama", tiny_tokenizer, seed=1)
    batch = ragged_batch()
    own = policy.log_likelihood(batch)
    same = policy.log_likelihood(batch, reference=policy.frozen_copy().log_likelihood(batch))
    assert same.divergence is not None
    assert float(same.divergence.detach().abs().max()) < 1e-5
    with torch.no_grad():
        reference = other.log_likelihood(batch)
    found = policy.log_likelihood(batch, reference=reference, divergence="reverse").divergence
    p, q = distributions(own), distributions(reference)
    torch.testing.assert_close(found, (p.exp() * (p - q)).sum(-1), atol=1e-5, rtol=1e-5)


def distributions(likelihood: Likelihood) -> torch.Tensor:
    assert likelihood.head is not None
    assert likelihood.hidden is not None
    return likelihood.head.logits(likelihood.hidden).log_softmax(-1)


def test_frozen_copy_is_constant_and_of_the_adapted_weights(tiny_tokenizer):
    from posttrain.models.adapters import add_lora

    policy = add_lora(make_policy("llama", tiny_tokenizer), rank=2)
    with torch.no_grad():
        for name, parameter in policy.trainable_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    batch = ragged_batch()
    copy = policy.frozen_copy()
    assert not copy.adapted
    assert not copy.trainable_parameters()
    expected = policy.log_likelihood(batch).logp.detach()
    torch.testing.assert_close(copy.log_likelihood(batch).logp, expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        for _, parameter in policy.trainable_parameters():
            parameter.zero_()
    torch.testing.assert_close(copy.log_likelihood(batch).logp, expected, atol=1e-5, rtol=1e-5)
    assert float((policy.log_likelihood(batch).logp.detach() - expected).abs().max()) > 1e-3


@pytest.mark.parametrize("name", ["llama", "gemma2", "deepseek", "opt"])
def test_groups_never_see_each_other(name, tiny_tokenizer):
    """All tokens of one group changed: the log-probabilities of the others stay."""
    policy, groups = make_policy(name, tiny_tokenizer), ragged_groups(3)
    batch = Batch.of(groups)
    with torch.no_grad():
        before = policy.log_likelihood(batch).logp
        for changed in range(len(groups)):
            other = Batch.of(groups)
            for s in (batch.group == changed).nonzero()[:, 0].tolist():
                other.tokens[s] = (other.tokens[s] + 13) % 64
            after = policy.log_likelihood(other).logp
            outside = batch.group[batch.sequence] != changed
            torch.testing.assert_close(after[outside], before[outside], atol=1e-6, rtol=1e-6)
            assert float((after - before)[~outside].abs().max()) > 1e-3


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_sequences_never_see_each_other(data, tiny_tokenizer):
    """Any tokens of one sequence changed, its share of the prompt included: siblings and strangers stay as they are."""
    shapes = data.draw(
        st.lists(
            st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=3)), max_size=3, min_size=1
        )
    )
    draw = torch.Generator().manual_seed(0)
    batch = Batch.of([continued(random_tokens(length, draw), completions, draw) for length, completions in shapes])
    changed = data.draw(st.integers(0, len(batch) - 1))
    places = data.draw(st.sets(st.integers(0, len(batch.tokens[changed]) - 1), min_size=1))
    policy = make_policy("gemma2", tiny_tokenizer)
    with torch.no_grad():
        before = policy.log_likelihood(batch).logp
        tokens = batch.tokens[changed].clone()
        for place in places:
            tokens[place] = (tokens[place] + 1) % 64
        batch.tokens[changed] = tokens
        after = policy.log_likelihood(batch).logp
        own = batch.sequence == changed
        torch.testing.assert_close(after[~own], before[~own], atol=1e-6, rtol=1e-6)
        # and within it, what stands before the first change does not see it
        early = own & (batch.place <= min(places))
        torch.testing.assert_close(after[early], before[early], atol=1e-6, rtol=1e-6)
        seeing = own & (batch.place == min(places) + 1)
        assert bool((after != before)[seeing].all())
