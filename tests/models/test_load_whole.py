"""Whether a folder holds all of its model: what is missing or of another shape is told, never made up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from conftest import make_model, make_tokenizer
from posttrain.models.load import load
from posttrain.trajectory import PosttrainError
from tiny_models import ARCHITECTURES, make_policy


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model as `save_pretrained` writes it."""
    made = tmp_path / "part"
    make_model().save_pretrained(made)
    make_tokenizer().save_pretrained(made)
    return made


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    """The folder, with something done to its tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("missing", "told"),
    [
        (["model.layers.1.mlp.up_proj.weight"], r"1 tensor \(model\.layers\.1\.mlp\.up_proj\.weight\)"),
        (["model.norm.weight"], r"1 tensor \(model\.norm\.weight\)"),
        (["model.embed_tokens.weight"], r"2 tensors \(lm_head\.weight, model\.embed_tokens\.weight\)"),  # tied
        (
            [f"model.layers.0.self_attn.{c}_proj.weight" for c in "kqvo"],
            r"4 tensors \(model\.layers\.0\.self_attn\.k_proj\.weight, \S+o_proj\S+, \S+q_proj\.weight and 1 more\)",
        ),
    ],
)
def test_missing_weights_are_told_by_name_and_never_made_up(folder, missing, told):
    changed(folder, lambda tensors: [tensors.pop(name) for name in missing])
    with pytest.raises(PosttrainError, match=rf"part lacks {told}; copy the folder again$") as error:
        load(folder, device="cpu")
    assert "\n" not in str(error.value)


def test_weights_in_other_shapes_are_told_with_both(folder):
    changed(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7)}))
    with pytest.raises(
        PosttrainError, match=r"says \(model\.norm\.weight \[7\] instead of \[32\]\); copy the folder again"
    ):
        load(folder, device="cpu")


def test_a_missing_expert_is_an_error_of_one_line(tmp_path):
    policy = make_policy("mixtral", make_tokenizer())
    folder = changed(
        policy.save(tmp_path / "experts"),
        lambda tensors: tensors.pop(min(name for name in tensors if ".experts." in name)),
    )
    with pytest.raises(PosttrainError, match="do not fit, so that one is missing or of another shape; copy it again"):
        load(folder, device="cpu")


def test_tensors_that_a_model_does_not_know_are_left(folder):
    changed(folder, lambda tensors: tensors.update({"model.layers.9.up.weight": torch.ones(2)}))
    prompt, model = torch.tensor([[1, 70, 71, 72, 90, 5]]), load(folder, precision="fp32", device="cpu").model
    with torch.no_grad():
        assert torch.equal(model(prompt).logits, make_model()(prompt).logits)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_whole_models_of_every_architecture_load(tmp_path, architecture):
    """With what each leaves out of its files and makes again: tied weights, buffers, positions, fused experts."""
    policy = make_policy(architecture, make_tokenizer())
    again = load(policy.save(tmp_path), precision="fp32", device="cpu")
    expected = policy.model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.model.state_dict().items())


@pytest.mark.parametrize("kind", ["BertLMHeadModel", "BertForMaskedLM", "BertForPreTraining"])
def test_bert_with_a_head_loads_and_without_one_does_not(tmp_path, kind):
    config = transformers.BertConfig(
        vocab_size=259, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    for name in (kind, "BertModel"):
        getattr(transformers, name)(config).save_pretrained(tmp_path / name)
        make_tokenizer().save_pretrained(tmp_path / name)
    assert type(load(tmp_path / kind, device="cpu").model).__name__ == "BertLMHeadModel"
    with pytest.raises(PosttrainError, match=r"BertModel lacks 6 tensors \(cls\.predictions\.bias, "):
        load(tmp_path / "BertModel", device="cpu")
