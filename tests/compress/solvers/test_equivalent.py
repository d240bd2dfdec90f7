"""Learned scales of channels: nothing changes at many bits, and the norm takes in what was learned."""

from __future__ import annotations

import pytest
import torch

from posttrain.compress.activations.dynamic import Dynamic
from posttrain.compress.calls import run
from posttrain.compress.fold import parameters
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.solvers.abq import ArbitraryBit
from posttrain.compress.solvers.omniquant import LearnedClipping
from posttrain.compress.solvers.reconstruct import Known
from posttrain.compress.transforms.smooth import SmoothQuant
from posttrain.compress.walk import Block
from tiny_blocks import GROUP, compressed, divergence, logits, packed, text, tiny, walk, weights


def first(name: str = "llama") -> Block:
    return next(iter(walk(tiny(name), text(1))))


def test_scales_start_as_those_of_smoothquant_and_are_folded_as_they_are() -> None:
    """Untrained it is SmoothQuant's fold with the ranges of the scaled weights."""
    one, other = first(), first()
    opened = LearnedClipping(Uniform(3, GROUP), scales=True).open(one, Known())
    opened.close()
    SmoothQuant(0.5).apply_to_block(other)
    other.refresh()
    LearnedClipping(Uniform(3, GROUP)).open(other, Known()).close()
    for norm in ("input_layernorm", "post_attention_layernorm"):
        torch.testing.assert_close(parameters(one.module)[f"{norm}.weight"], parameters(other.module)[f"{norm}.weight"])
    for a, b in zip(packed(one.module).values(), packed(other.module).values(), strict=True):
        torch.testing.assert_close(a.weight.dequantize(), b.weight.dequantize(), atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt-neox"])
def test_at_many_bits_the_block_gives_what_it_gave(name: str) -> None:
    block = first(name)
    before = run(block.module, block.inputs[0])
    opened = LearnedClipping(Uniform(8, GROUP), scales=True, start=30.0).open(block, Known())
    with torch.no_grad():
        for layer in opened.layers.values():
            if layer.columns is not None:
                layer.columns.log.add_(0.3)
        training = run(block.module, block.inputs[0])
        opened.close()
        after = run(block.module, block.inputs[0])
    torch.testing.assert_close(after, training, atol=1e-4, rtol=1e-4)  # what is stored is what was trained
    assert float((after - before).norm() / before.norm()) < 0.02


def test_layers_that_share_a_norm_share_its_scale_and_one_tells_it() -> None:
    opened = LearnedClipping(Uniform(3, GROUP), scales=True).open(first(), Known())
    shared = {name: id(layer.columns) for name, layer in opened.layers.items() if layer.columns is not None}
    assert shared.keys() == {f"self_attn.{p}_proj" for p in "qkv"} | {"mlp.gate_proj", "mlp.up_proj"}
    assert len(set(shared.values())) == 2
    told = [id(p) for layer in opened.layers.values() for group in layer.soft.groups() for p in group["params"]]
    assert len(told) == len(set(told)) == 2 * 7 + 2


def test_channels_that_stick_out_are_evened_where_inputs_are_rounded() -> None:
    def outlying() -> torch.nn.Module:
        model = tiny(num_hidden_layers=1)
        layer = model.model.layers[0]  # type: ignore[union-attr, index]
        with torch.no_grad():
            layer.input_layernorm.weight[5] *= 40
            for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
                part.weight[:, 5] /= 40
        return model

    batches = text(2)
    truth = logits(outlying(), batches)
    grid, rounding = Uniform(4, GROUP), Dynamic(4, symmetric=False)
    loss = {
        scales: divergence(
            compressed(outlying(), LearnedClipping(grid, 2, scales=scales), batches, activations=rounding),
            truth,
            batches,
        )
        for scales in (False, True)
    }
    assert loss[True] < 0.7 * loss[False]


def test_both_methods_learn_them() -> None:
    batches = text(1)
    for solver in (LearnedClipping, ArbitraryBit):
        plain, scaled = (
            compressed(tiny(num_hidden_layers=1), solver(Uniform(4, GROUP), 1, scales=s), batches)
            for s in (False, True)
        )
        assert any(
            not torch.equal(a, b) for a, b in zip(weights(plain).values(), weights(scaled).values(), strict=True)
        )
