"""Rotations of the residual stream and inside blocks: nothing changes, single large channels vanish."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from block_models import batches_of, blocks_of, first_block, logits, model_of, same, transform
from posttrain.compress.packed.linear import TransformedLinear
from posttrain.compress.transforms.online import OnlineHadamard
from posttrain.compress.transforms.rotation import ResidualRotation, rotation_matrix
from posttrain.trajectory import PosttrainError

ROTATED = ["llama", "qwen2", "qwen3", "phi3", "opt", "gpt-neox", "mixtral", "mamba", "gemma", "mistral"]
REFUSED = {
    "gemma2": "norm on a layer's outputs",
    "bert": "residual stream of a post-norm block",
    "vit": "expected a language model",
    "bloom": "more than a sum of tables",
}
SMOLLM2 = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3,
           "head_dim": 64, "initializer_range": 0.04}  # fmt: skip


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_the_matrix_is_a_rotation_that_spreads(kind: Any, centred: bool) -> None:
    found = rotation_matrix(48, kind, centred, seed=3)
    assert torch.allclose(found @ found.T, torch.eye(48, dtype=torch.float64), atol=1e-12)
    ones = torch.ones(48, dtype=torch.float64)
    assert torch.allclose(ones @ found, ones, atol=1e-12) == centred
    assert found.abs().max() < 0.7
    assert not torch.allclose(found, rotation_matrix(48, kind, centred, seed=4))


def test_widths_without_a_matrix_and_unknown_kinds() -> None:
    with pytest.raises(PosttrainError, match="order 33 is known here; take the kind orthogonal"):
        rotation_matrix(33)
    with pytest.raises(PosttrainError, match="expected hadamard or orthogonal"):
        rotation_matrix(32, "random")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ROTATED)
def test_the_rotated_model_is_the_model(name: str) -> None:
    model = model_of(name)
    before, table = logits(model), model.get_input_embeddings().weight.clone()  # type: ignore[operator]
    transform(model, [ResidualRotation(), OnlineHadamard()])
    assert same(logits(model), before)
    assert not same(model.get_input_embeddings().weight, table, 0.1)  # type: ignore[operator]


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_rotated_say_why_and_stay_as_they_were(name: str) -> None:
    model = model_of(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(PosttrainError, match=REFUSED[name]):
        ResidualRotation().apply_to_model(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_tied_vocabulary_is_untied_and_the_configuration_says_so() -> None:
    model: Any = model_of("llama")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ResidualRotation().apply_to_model(model)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert model.config.tie_word_embeddings is False


def test_gains_are_folded() -> None:
    model: Any = model_of("gemma")
    ResidualRotation().apply_to_model(model)
    assert torch.equal(model.model.norm.weight, torch.zeros(32))  # the gain is 1 + weight
    model = model_of("opt")
    ResidualRotation().apply_to_model(model)
    assert torch.equal(model.model.decoder.layers[0].final_layer_norm.weight, torch.ones(32))


def test_a_gain_of_0_beside_a_bias_is_refused() -> None:
    model: Any = model_of("opt")
    model.model.decoder.layers[1].final_layer_norm.weight[3] = 0.0
    with pytest.raises(PosttrainError, match=r"layers\.1\.final_layer_norm has a bias and gains of 0"):
        ResidualRotation().apply_to_model(model)


def test_half_precision_models_are_rotated_in_their_own_precision() -> None:
    model: Any = model_of("llama").bfloat16()
    before = logits(model).float()
    ResidualRotation().apply_to_model(model)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert (logits(model).float() - before).norm() < 0.1 * before.norm()


def test_large_channels_of_the_residual_stream_vanish() -> None:
    model: Any = model_of("llama")
    model.model.embed_tokens.weight[:, 5] *= 50
    assert kurtosis(model) > 20
    ResidualRotation().apply_to_model(model)
    assert kurtosis(model) < 4


def kurtosis(model: Any) -> float:
    x = blocks_of(model)[0].inputs[0].hidden
    return float((x**4).mean() / (x**2).mean() ** 2)


def test_which_layers_are_multiplied_when_the_model_runs() -> None:
    block = first_block("llama")
    OnlineHadamard().apply_to_block(block)
    steps = {n: m.inputs[0].settings() for n, m in block.module.named_modules() if isinstance(m, TransformedLinear)}
    assert steps == {"self_attn.o_proj": {"heads": 4}, "mlp.down_proj": {"heads": 0}}


def test_heads_whose_number_has_no_matrix_are_multiplied_within_alone() -> None:
    block = first_block("llama", hidden_size=48, num_attention_heads=6, num_key_value_heads=2)
    before, value = block.outputs()[0], block.linears["self_attn.v_proj"].weight.clone()
    OnlineHadamard().apply_to_block(block)
    assert not isinstance(block.module.get_submodule("self_attn.o_proj"), TransformedLinear)
    assert not torch.equal(block.module.get_parameter("self_attn.v_proj.weight"), value)
    assert same(block.outputs()[0], before)


def test_widths_that_are_no_powers_of_two() -> None:
    # 576 = 36 * 16, 1536 = 12 * 128, and nine heads, across which nothing is mixed
    model = model_of("llama", **SMOLLM2)
    before = logits(model)
    transform(model, [ResidualRotation(), OnlineHadamard()])
    assert same(logits(model), before)
    steps = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, TransformedLinear)}
    assert steps == {"down_proj"}


def test_heads_can_be_left_alone_and_must_be_where_their_width_has_no_matrix() -> None:
    block = first_block("llama", head_dim=6)
    before = block.outputs()[0]
    with pytest.raises(PosttrainError, match=r"heads of 6 channels .* turn the option heads off"):
        OnlineHadamard().apply_to_block(block)
    block = first_block("llama", head_dim=6)
    OnlineHadamard(heads=False).apply_to_block(block)
    assert not isinstance(block.module.get_submodule("self_attn.o_proj"), TransformedLinear)
    assert same(block.outputs()[0], before)


def test_skipped_layers_get_no_step() -> None:
    model = model_of("llama")
    from posttrain.compress.stacks import stacks
    from posttrain.compress.walk import Walk

    walk = Walk(model, stacks(model)[0], batches_of(model), skip=("*.down_proj", "*.o_proj"))
    block = next(iter(walk))
    before = block.outputs()[0]
    OnlineHadamard().apply_to_block(block)
    assert not any(isinstance(m, TransformedLinear) for m in block.module.modules())
    assert same(block.outputs()[0], before)
