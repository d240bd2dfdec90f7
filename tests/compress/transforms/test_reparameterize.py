"""Ranges of channels folded into norms and layers: the same function, the same integers, and known limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from block_models import batches_of, blocks_of, first_block, logits, model_of, same, transform
from posttrain.compress.activations.dual_clip import learned_extent
from posttrain.compress.activations.static import StaticStep
from posttrain.compress.fold import change, parameters
from posttrain.compress.structure import norm_outputs, structure
from posttrain.compress.transforms.gains import FoldedGains
from posttrain.compress.transforms.reparameterize import Reparameterization, raised
from posttrain.compress.transforms.smooth import SmoothQuant
from posttrain.compress.walk import Block
from posttrain.trajectory import PosttrainError


def uneven(name: str = "vit") -> nn.Module:
    """A model with channels of its norms' outputs that differ by far, and lie away from 0 where norms have biases."""
    model, draw = model_of(name), torch.Generator().manual_seed(3)
    for block in blocks_of(model):
        for site in structure(block).norms:
            scale = torch.exp2(4 * torch.rand(32, generator=draw) - 2)
            shift = torch.randn(32, generator=draw) if site.bias and not site.others else None
            change(block.module, site.scaled(parameters(block.module), scale, shift))
    return model


def given(block: Block, norm: str) -> Tensor:
    """`[tokens, in]` what a norm gives on the block's inputs."""
    return norm_outputs(block, [norm], keep=4096)[norm].kept


def codes(step: StaticStep, x: Tensor) -> Tensor:
    return (torch.round(x.double() / step.scale.double()) + step.zero.double()).clamp(0, 2**step.bits - 1)


@pytest.mark.limit("repquant", "dopq-vit")
@pytest.mark.parametrize("name", ["vit", "opt", "llama", "gemma", "mixtral", "gpt-neox"])
@pytest.mark.parametrize("centre", ["mean", "median"])
def test_the_function_stays_what_it_was(name: str, centre: Any) -> None:
    model = uneven(name)
    before, weights = logits(model), [p.clone() for p in model.parameters()]
    transform(model, [Reparameterization(4, centre)])
    assert same(logits(model), before)
    assert any(not torch.equal(p, was) for p, was in zip(model.parameters(), weights, strict=True))


@pytest.mark.limit("repquant", "dopq-vit")
@pytest.mark.parametrize("centre", ["mean", "median"])
@pytest.mark.parametrize("ends", ["whole", "percentile", "learned"])
def test_every_integer_is_what_it_was_with_a_range_a_channel(centre: Any, ends: Any) -> None:
    """Card 029: with a whole zero point, quantized integers before and after the fold are equal for every element."""
    steps, outputs = [], []
    for folded in (False, True):
        block = blocks_of(uneven())[0]
        norms = [site for site in structure(block).norms if site.linears]
        Reparameterization(3, centre, ends, folded=folded, steps=5).apply_to_block(block)
        steps.append([block.quantizers[site.linears[0]] for site in norms])
        outputs.append([given(block, site.norm) for site in norms])
    for apart, one, x, folded_x in zip(*steps, *outputs, strict=True):
        assert isinstance(apart, StaticStep)
        assert isinstance(one, StaticStep)
        assert (apart.scale.shape, one.scale.shape) == ((32,), ())
        assert float(one.zero) == round(float(one.zero))
        differ = codes(apart, x) != codes(one, folded_x)
        # one in a thousand may lie on a threshold to seven digits
        assert float(differ.float().mean()) < 1e-3
        assert len(codes(one, folded_x).unique()) == 8


@pytest.mark.limit("dopq-vit")
def test_a_zero_point_that_is_no_whole_number_moves_thresholds() -> None:
    block, other = blocks_of(uneven())[0], blocks_of(uneven())[0]
    site = structure(block).norms[0]
    x = given(block, site.norm)
    Reparameterization(3, folded=False).apply_to_block(other)
    Reparameterization(3, whole=False).apply_to_block(block)
    apart, one = other.quantizers[site.linears[0]], block.quantizers[site.linears[0]]
    assert isinstance(apart, StaticStep)
    assert isinstance(one, StaticStep)
    moved = one(given(block, site.norm)) / one.scale - apart(x) / apart.scale + apart.zero - one.zero
    assert float((moved.abs() > 1e-3).float().mean()) > 0.02


@pytest.mark.limit("dopq-vit")
def test_channels_that_are_alike_are_left_alone() -> None:
    for centre in ("mean", "median"):
        part = Reparameterization(4, centre)  # type: ignore[arg-type]
        scale, zero = torch.full((8,), 0.3), torch.full((8,), 5.0)
        one, common = part.common(scale, zero)
        assert (float(one), float(common)) == (pytest.approx(0.3), 5.0)
    block = blocks_of(model_of("vit"))[0]
    site = structure(block).norms[0]
    with torch.no_grad():  # constants are ranges that are alike
        block.module.get_parameter(f"{site.norm}.weight").zero_()
        block.module.get_parameter(f"{site.norm}.bias").fill_(0.7)
    kept = {name: value.clone() for name, value in parameters(block.module).items()}
    Reparameterization(4).apply_to_block(block)
    owned = (site.norm, *site.linears)
    same_as_before = {n: torch.allclose(v, kept[n], atol=1e-5) for n, v in parameters(block.module).items()}
    assert all(alike for n, alike in same_as_before.items() if n.rpartition(".")[0] in owned)
    assert not all(same_as_before.values()), "the other norm's channels are not alike"


@pytest.mark.limit("repquant")
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_without_a_bias_it_is_smoothquant_with_all_of_it_in_the_weights(name: str) -> None:
    """r2 = 0: divided by each channel's largest input, up to one factor for all."""
    found, smooth = uneven(name), uneven(name)
    one, other = blocks_of(found)[0], blocks_of(smooth)[0]
    sites = structure(one).norms
    Reparameterization(4, ends="whole").apply_to_block(one)
    SmoothQuant(1.0).apply_to_block(other)
    for site in sites:
        ratio = one.module.get_parameter(f"{site.norm}.weight") / other.module.get_parameter(f"{site.norm}.weight")
        assert torch.allclose(ratio, ratio.mean().expand(32), rtol=1e-4)
        step = one.quantizers[site.linears[0]]
        assert isinstance(step, StaticStep)
        assert step.symmetric


def test_by_the_equations() -> None:
    """γ, β, W and b of a ViT's first norm, from s and z written here."""
    block = blocks_of(uneven())[0]
    site = structure(block).norms[0]
    met = norm_outputs(block, [site.norm])[site.norm]
    was = {name: value.clone() for name, value in parameters(block.module).items()}
    Reparameterization(4, ends="whole").apply_to_block(block)
    s = (met.maximum - met.minimum) / 15
    z = torch.round(-met.minimum / s)
    r1, r2 = s / s.mean(), z - z.mean().round()
    now, query = parameters(block.module), "attention.q_proj"
    assert torch.allclose(now[f"{site.norm}.weight"], was[f"{site.norm}.weight"] / r1, atol=1e-5)
    assert torch.allclose(now[f"{site.norm}.bias"], (was[f"{site.norm}.bias"] + s * r2) / r1, atol=1e-4)
    assert torch.allclose(now[f"{query}.weight"], was[f"{query}.weight"] * r1, atol=1e-5)
    assert torch.allclose(now[f"{query}.bias"], was[f"{query}.bias"] - was[f"{query}.weight"] @ (s * r2), atol=1e-4)


def test_dead_and_constant_channels() -> None:
    model = uneven()
    for block in blocks_of(model):
        for site in structure(block).norms:
            with torch.no_grad():
                block.module.get_parameter(f"{site.norm}.weight")[[2, 7]] = 0.0
                block.module.get_parameter(f"{site.norm}.bias")[2] = 0.0
    before = logits(model)
    transform(model, [Reparameterization(4)])
    assert same(logits(model), before)
    assert raised(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]


def test_layers_that_are_skipped_are_folded_and_not_rounded() -> None:
    model = uneven()
    before = logits(model)
    from posttrain.compress.stacks import stacks
    from posttrain.compress.walk import Walk

    block = next(iter(Walk(model, stacks(model)[0], batches_of(model), skip=["*.q_proj"])))
    Reparameterization(4).apply_to_block(block)
    assert set(block.quantizers) == {"attention.k_proj", "attention.v_proj", "mlp.fc1"}
    assert same(logits(model), before)


def test_a_post_norm_block_is_refused() -> None:
    with pytest.raises(PosttrainError, match="Reparameterization cannot fold a scale into"):
        Reparameterization(4).apply_to_block(first_block("bert"))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"centre": "mode"}, "centre is 'mode'; expected mean or median"),
        ({"ends": "all"}, "ends is 'all'; expected whole, percentile or learned"),
        ({"bits": 1}, "2 to 16"),
    ],
)
def test_mistakes_are_told(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(PosttrainError, match=told):
        Reparameterization(**wrong)


@pytest.mark.parametrize("name", ["llama", "gemma", "mamba"])
def test_folded_gains(name: str) -> None:
    model = model_of(name)
    with torch.no_grad():
        for block in blocks_of(model):
            for site in structure(block).norms:
                block.module.get_parameter(f"{site.norm}.weight")[3] = -site.offset  # a gain of 0
    before = logits(model)
    transform(model, [FoldedGains()])
    assert same(logits(model), before)
    for block in blocks_of(model):
        for site in structure(block).norms:
            assert torch.equal(site.gain(parameters(block.module)), torch.ones(32))


def test_a_channel_that_never_changes_has_no_say_in_the_common_zero_point() -> None:
    made = Reparameterization(4)
    scale, zero = torch.tensor([1e-3, 1.0, 2.0]), torch.tensor([-8000.0, 5.0, 8.0])
    assert made.common(scale, zero) == (1.5, 6.0)
    assert made.common(torch.ones(2), torch.tensor([3.0, 5.0])) == (1.0, 4.0)


def test_a_learned_extent_loses_no_more_than_the_whole_one_and_keeps_dead_channels() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(400, 6, generator=draw) ** 3
    x[:, 5] = 0.0
    weight, extent = torch.randn(8, 6, generator=draw), x.abs().amax(0)

    def loss(most: torch.Tensor) -> float:
        scale = torch.where(most > 0, most / 7, torch.ones_like(most))
        error = (torch.round(x / scale).clamp(-8, 7) * scale - x) @ weight.T
        return float(error.square().sum())

    found = learned_extent(x, [weight], extent, 4)
    assert loss(found) < 0.9 * loss(extent)
    assert bool((found <= extent).all())
    assert float(found[5]) == 0
