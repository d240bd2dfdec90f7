"""LoRA: what is trained, where it starts, and what it may not touch."""

from __future__ import annotations

import pytest
import torch

from posttrain.models.adapters import add_lora
from posttrain.trajectory import PosttrainError
from tiny_models import make_policy, ragged_batch


@pytest.fixture
def policy(tiny_tokenizer):
    return make_policy("llama", tiny_tokenizer)


def test_a_fresh_adapter_changes_nothing_and_alone_is_trained(policy):
    batch = ragged_batch()
    before = policy.log_likelihood(batch).logp.detach()
    linear = sum(isinstance(m, torch.nn.Linear) for m in policy.model.model.modules())
    adapted = add_lora(policy, rank=3)
    assert torch.equal(adapted.log_likelihood(batch).logp, before)
    names = [n for n, _ in adapted.trainable_parameters()]
    assert len(names) == 2 * linear
    assert all("lora_A" in n or "lora_B" in n for n in names)
    assert {min(p.shape) for _, p in adapted.trainable_parameters()} == {3}
    assert not any("lm_head" in n for n in names)
    assert adapted.adapted
    assert adapted.packs


def test_the_adapter_adds_its_scaled_product(policy):
    weight = policy.model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    adapted = add_lora(policy, rank=2, alpha=6.0, target_modules=["q_proj"])
    parameters = dict(adapted.trainable_parameters())
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.normal_()
    (a,) = (p for n, p in parameters.items() if "layers.0" in n and "lora_A" in n)
    (b,) = (p for n, p in parameters.items() if "layers.0" in n and "lora_B" in n)
    merged = adapted.merged().model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(merged, weight + 6.0 / 2 * b @ a)


def test_without_the_adapter_it_is_the_model_it_was(policy):
    batch = ragged_batch()
    before = policy.log_likelihood(batch).logp.detach()
    adapted = add_lora(policy, rank=2)
    with torch.no_grad():
        for _, parameter in adapted.trainable_parameters():
            parameter.normal_(std=0.3)
    with adapted.without_adapter() as reference:
        found = reference.log_likelihood(batch).logp
    assert torch.equal(found, before)
    assert not found.requires_grad
    assert float((adapted.log_likelihood(batch).logp - before).detach().abs().max()) > 1e-2


def test_the_seed_sets_the_start_and_leaves_other_random_numbers_alone(tiny_tokenizer):
    starts = []
    for seed in (0, 0, 1):
        torch.manual_seed(5)
        adapted = add_lora(make_policy("llama", tiny_tokenizer), rank=2, seed=seed)
        starts.append(torch.cat([p.detach().flatten() for n, p in adapted.trainable_parameters() if "lora_A" in n]))
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])
    model = make_policy("llama", tiny_tokenizer)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    add_lora(model, rank=2)
    assert torch.equal(torch.rand(3), expected)


def test_a_second_adapter_is_refused(policy):
    with pytest.raises(PosttrainError, match="already has an adapter"):
        add_lora(add_lora(policy, rank=2), rank=2)


@pytest.mark.parametrize("target", [["q_proj", "lm_head"], ".*(lm_head|q_proj)"])
def test_the_vocabulary_projection_is_not_adapted(policy, target):
    with pytest.raises(PosttrainError, match="vocabulary projection"):
        add_lora(policy, rank=2, target_modules=target)
    assert not policy.adapted
    assert all(p.requires_grad for p in policy.model.parameters())
    add_lora(policy, rank=2)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_an_adapter_made_elsewhere_on_the_projection_is_refused(policy, tiny_tokenizer):
    from peft import LoraConfig, get_peft_model

    from posttrain.models.causal import CausalPolicy

    wrapped = get_peft_model(policy.model, LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM"))
    with pytest.raises(PosttrainError, match="vocabulary projection, which is not supported"):
        CausalPolicy(wrapped, tiny_tokenizer).log_likelihood(ragged_batch())


@pytest.mark.parametrize("options", [{"rank": 0}, {"target_modules": ["no_such_layer"]}])
def test_settings_that_fit_nothing_are_one_line_errors(policy, options):
    with pytest.raises(PosttrainError, match=r"^LoRA: ") as error:
        add_lora(policy, **options)
    assert "\n" not in str(error.value)


def test_taking_the_adapter_off_gives_the_plain_policy_back(policy):
    batch = ragged_batch()
    before = policy.log_likelihood(batch).logp.detach()
    adapted = add_lora(policy, rank=2)
    with torch.no_grad():
        for _, parameter in adapted.trainable_parameters():
            parameter.normal_()
    adapted.model.unload()
    assert not policy.adapted
    assert torch.equal(policy.log_likelihood(batch).logp, before)
