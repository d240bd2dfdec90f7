"""Quamba: known limits, and what its parts are for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from block_models import batches_of, logits, model_of, same, transform
from conftest import make_tokenizer
from posttrain import load, methods
from posttrain.compress.grids.whole import WholeMatrix
from posttrain.compress.method import Compression
from posttrain.compress.packed.linear import PackedLinear
from posttrain.compress.pipeline import compress_model
from posttrain.compress.policy import CompressedPolicy, compressed_copy
from posttrain.compress.solvers.rtn import RoundToNearest
from posttrain.compress.transforms.hadamard import hadamard, multiplied
from posttrain.models.mixers import Mixer
from posttrain.rollout.engine_choice import engine_for
from posttrain.studies.planted import large_scan_outputs
from posttrain.trajectory import PosttrainError, Prompt, Sampling
from tiny_models import make_policy


def compressed(model: nn.Module, method: Compression, rows: int = 16) -> Any:
    made = copy.deepcopy(model)
    compress_model(made, method, batches_of(made, rows))
    return made


def planted() -> nn.Module:
    """Two channels of each scan's output fifty times as large, in the same function."""
    policy = make_policy("mamba", make_tokenizer())
    before = logits(policy.model)
    large_scan_outputs(policy, 0)
    assert same(logits(policy.model), before)
    model: nn.Module = policy.model
    return model.requires_grad_(False)


def error(model: nn.Module, method: Compression) -> float:
    before = logits(model)
    return float((logits(compressed(model, method)) - before).norm() / before.norm())


@pytest.mark.limit("quamba")
@pytest.mark.parametrize("expand", [1, 2, 3])  # 32, 64 and 96 channels: of 96 the matrix is not symmetric
def test_the_transforms_change_nothing(expand: int) -> None:
    model = model_of("mamba", expand=expand, intermediate_size=32 * expand)
    before = logits(model)
    weight = model.backbone.layers[0].mixer.out_proj.weight.clone()
    transform(model, methods.quamba().transforms)
    mixer = model.backbone.layers[0].mixer
    assert isinstance(mixer, Mixer)
    h = hadamard(32 * expand) / (32 * expand) ** 0.5
    assert torch.allclose(mixer.out_proj.weight, (weight.double() @ h.T).float(), atol=1e-6)
    assert torch.equal(h, h.T) == (expand < 3)
    assert same(logits(model), before)


@pytest.mark.limit("quamba")
def test_a_rotation_keeps_lengths_and_spreads_a_single_channel() -> None:
    draw = torch.Generator().manual_seed(0)
    y = torch.randn(7, 192, generator=draw, dtype=torch.float64)
    assert torch.allclose(multiplied(y).norm(dim=-1), y.norm(dim=-1))
    one = torch.zeros(192, dtype=torch.float64)
    one[17] = 5.0
    assert torch.allclose(multiplied(one).abs(), torch.full((192,), 5 / 192**0.5, dtype=torch.float64))


@pytest.mark.limit("quamba")
def test_with_many_bits_of_activations_only_weights_are_rounded() -> None:
    model = model_of("mamba")
    method = methods.quamba(activation_bits=16, percentile=None)
    alone = Compression("rtn", RoundToNearest(WholeMatrix(8)), method.transforms)
    one, other = compressed(model, method), compressed(model, alone)
    for part in ("conv1d.weight", "conv1d.bias", "A_log", "D", "dt_bias"):  # which `alone` leaves as they are
        for i in range(2):
            place = f"backbone.layers.{i}.mixer.{part}"
            with torch.no_grad():
                other.get_parameter(place).copy_(one.get_parameter(place))
    batch = batches_of(model, 16)[0]
    with torch.no_grad():
        assert same(one(**batch).logits, other(**batch).logits, 1e-3)


@pytest.mark.limit("quamba")
def test_every_layer_is_packed_with_one_scale() -> None:
    found = compressed(model_of("mamba"), methods.quamba())
    layers = {n.rpartition(".")[2]: m for n, m in found.named_modules() if isinstance(m, PackedLinear)}
    assert set(layers) == {"in_proj", "x_proj", "dt_proj", "out_proj"}
    assert all(len(layer.weight.scale.unique()) == 1 for layer in layers.values())
    assert [type(step).__name__ for step in layers["out_proj"].inputs] == ["HadamardStep", "StaticStep"]
    assert layers["x_proj"].inputs is layers["dt_proj"].inputs is None


def test_rotation_removes_what_large_outputs_cost() -> None:
    model = planted()
    static = error(model, methods.quamba(percentile=None, rotate=False))
    rotated = error(model, methods.quamba(percentile=None))
    assert rotated < 0.6 * static  # 48 channels cannot hide two that are fifty times as large
    assert error(model, methods.quamba()) < 0.6 * static


def test_fewer_bits_by_gptq_lose_less_than_the_nearest() -> None:
    model = model_of("mamba")
    errors = [error(model, methods.quamba(3, 16, solver=solver)) for solver in ("gptq", "nearest")]  # type: ignore[arg-type]
    assert errors[0] < errors[1]


def test_it_is_decoded_and_kept(tmp_path: Path) -> None:
    policy = make_policy("mamba", make_tokenizer())
    tokens = torch.randint(0, 60, (4, 20), generator=torch.Generator().manual_seed(0))
    small = compressed_copy(policy, methods.quamba(state_bits=8), [{"input_ids": tokens, "use_cache": False}])
    assert small.compression.left == []
    again = load(str(small.save(tmp_path / "small")), precision="fp32")
    assert isinstance(again, CompressedPolicy)
    with torch.no_grad():
        whole = small.model(input_ids=tokens, use_cache=False).logits
        assert torch.equal(again.model(input_ids=tokens, use_cache=False).logits, whole)
    (made,) = engine_for(again).generate([Prompt(tokens[0, :6])], 1, Sampling(max_tokens=5), seed=0)
    text = torch.cat([tokens[0, :6], made[0].tokens])
    with torch.no_grad():
        told = small.model(input_ids=text[None], use_cache=False).logits[0].log_softmax(-1)
    expected = told[range(5, len(text) - 1), text[6:]]
    torch.testing.assert_close(made[0].logp_full, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: methods.quamba(solver="best"), "solver is 'best'; expected nearest or gptq"),  # type: ignore[arg-type]
        (lambda: methods.quamba(percentile=0.1), "quantile is 0.1"),
        (lambda: compress_model(m := model_of("llama"), methods.quamba(), batches_of(m)), "has no Mamba mixer to take"),
    ],
)
def test_mistakes_are_told(wrong: Any, told: str) -> None:
    with pytest.raises(PosttrainError, match=told):
        wrong()
