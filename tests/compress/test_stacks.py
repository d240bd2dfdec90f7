"""Where the blocks of a model are, and which linear layers in them are compressed."""

from __future__ import annotations

import pytest
from torch import nn
from walkable import WALKABLE, walkable

from posttrain.compress.stacks import check_patterns, linears, replace_module, skipped, stacks, whole_names
from posttrain.trajectory import PosttrainError

PLACES = {
    "llama": ("model.layers", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
                               "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]),
    "opt": ("model.decoder.layers", ["self_attn.k_proj", "self_attn.v_proj", "self_attn.q_proj", "self_attn.out_proj",
                                     "fc1", "fc2"]),
    "gpt-neox": ("gpt_neox.layers", ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h",
                                     "mlp.dense_4h_to_h"]),
    "mamba": ("backbone.layers", ["mixer.in_proj", "mixer.x_proj", "mixer.dt_proj", "mixer.out_proj"]),
}  # fmt: skip


@pytest.mark.parametrize("name", PLACES)
def test_the_blocks_and_their_linear_layers(name: str) -> None:
    where, layers = PLACES[name]
    (stack,) = stacks(walkable(name)[0])
    assert stack.name == where
    assert len(stack.blocks) == 2
    assert [n for n, _ in whole_names(stack)] == [f"{where}.0", f"{where}.1"]
    assert sorted(linears(stack.blocks[0])) == sorted(layers)


@pytest.mark.parametrize("name", WALKABLE)
def test_every_architecture_has_one_stack_without_its_head(name: str) -> None:
    model, _ = walkable(name)
    (stack,) = stacks(model)
    inside = {id(m) for block in stack.blocks for m in block.modules()}
    outside = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) not in inside]
    assert all(n.rpartition(".")[2] in ("lm_head", "embed_out", "dense", "pooler", "classifier") for n in outside)


class Seeing(nn.Module):
    """Two stacks, a list of another kind, and lists inside of blocks."""

    def __init__(self) -> None:
        super().__init__()
        inner = [nn.ModuleDict({"parts": nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])}) for _ in range(4)]
        self.vision = nn.ModuleList(inner[:2])
        self.mixed = nn.ModuleList([nn.Linear(2, 2), nn.ReLU()])
        self.norms = nn.ModuleList([nn.LayerNorm(2), nn.LayerNorm(2)])
        self.text = nn.ModuleList(inner[2:])


def test_two_stacks_and_what_is_none() -> None:
    assert [stack.name for stack in stacks(Seeing())] == ["vision", "text"]
    assert list(linears(Seeing().text[1], "text.1")) == ["parts.0", "parts.1"]


def test_a_model_without_blocks() -> None:
    with pytest.raises(PosttrainError, match=r"^Sequential has no list of blocks with linear layers; expected "):
        stacks(nn.Sequential(nn.Linear(2, 2)))


def test_layers_to_skip_by_their_whole_name() -> None:
    model, _ = walkable("llama")
    (stack,) = stacks(model)
    left = linears(stack.blocks[0], "model.layers.0", ["*.mlp.*", "model.layers.1.*", "*.o_proj"])
    assert list(left) == ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]
    assert skipped("model.layers.1.mlp", ["*.1.*"])
    assert not skipped("model.layers.1.mlp", [])


def test_a_pattern_that_matches_nothing() -> None:
    model, _ = walkable("llama")
    check_patterns(model, ["*.down_proj", "lm_head"])
    with pytest.raises(PosttrainError, match=r"skip pattern 'down_proj' matches no linear layer; names are such as mo"):
        check_patterns(model, ["*.down_proj", "down_proj"])


def test_putting_a_module_in_the_place_of_another() -> None:
    model, _ = walkable("llama")
    other = nn.Identity()
    replace_module(model, "model.layers.1.mlp.up_proj", other)
    assert model.model.layers[1].mlp.up_proj is other
    replace_module(model, "lm_head", other)
    assert model.lm_head is other
