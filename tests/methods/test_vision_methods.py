"""DopQ-ViT and RepQuant: each equals something known in a limit, and does what it is for."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from block_models import batches_of, blocks_of, logits, model_of
from posttrain import methods
from posttrain.compress.activations.percentile import Percentile
from posttrain.compress.activations.static import StaticStep
from posttrain.compress.fold import change, parameters
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.method import Compression
from posttrain.compress.packed.linear import PackedLinear
from posttrain.compress.pipeline import compress_model
from posttrain.compress.rounded_attention import AttentionRounding
from posttrain.compress.solvers.adaround import BlockRounding
from posttrain.compress.solvers.rtn import RoundToNearest
from posttrain.compress.structure import structure
from posttrain.compress.transforms.reparameterize import Reparameterization
from posttrain.trajectory import PosttrainError


def uneven(name: str = "vit") -> nn.Module:
    """The same function with three channels of each norm's output twenty times as large; the norms' readers undo it."""
    model = model_of(name)
    for block in blocks_of(model):
        for site in structure(block).norms:
            scale = torch.ones(32)
            scale[[3, 10, 20]] = 1 / 20
            change(block.module, site.scaled(parameters(block.module), scale))
    return model


def compressed(model: nn.Module, method: Compression, rows: int = 16) -> nn.Module:
    made = copy.deepcopy(model)
    compress_model(made, method, batches_of(made, rows))
    return made


def error(model: nn.Module, method: Compression) -> float:
    before = logits(model)
    return float((logits(compressed(model, method)) - before).norm() / before.norm())


def packed(model: nn.Module) -> dict[str, Tensor]:
    return {n: m.weight.dequantize() for n, m in model.named_modules() if isinstance(m, PackedLinear)}


# -- limits


@pytest.mark.limit("repquant", "dopq-vit")
@pytest.mark.parametrize("name", ["dopq", "repquant"])
def test_with_many_bits_of_activations_only_weights_are_rounded(name: str) -> None:
    """On what it was calibrated on, nothing of which is cut off."""
    model: Any = model_of("vit")
    whole = {"activation_bits": 16, "softmax": "uniform"}
    method = methods.dopq_vit(8, **whole) if name == "dopq" else methods.repquant(8, reconstruction="none", **whole)
    widest = method.replace(
        transforms=(Reparameterization(16, "median" if name == "dopq" else "mean", "whole"),),
        activations=Percentile(16, quantiles=(1.0,)),
        attention=None,
    )
    weights = Compression("rtn", RoundToNearest(Uniform(8, 0, "integer", clip="mse")), widest.transforms)
    one, other = compressed(model, widest), compressed(model, weights)
    batch = batches_of(model, 16)[0]
    with torch.no_grad():
        found, wanted = one(**batch).logits, other(**batch).logits
    assert float((found - wanted).norm() / wanted.norm()) < 2e-3
    first = {n: w for n, w in packed(other).items() if ".layers.0." in n}  # the others' ranges follow its outputs
    assert len(first) == 6
    assert all(torch.equal(packed(one)[n], w) for n, w in first.items())


@pytest.mark.limit("repquant")
def test_repquant_without_its_parts_is_rounding_to_nearest_between_quantiles() -> None:
    model = model_of("vit")
    method = methods.repquant(softmax="none", reconstruction="none").replace(transforms=())
    plain = Compression("rtn", RoundToNearest(Uniform(4, 0, clip="mse")), activations=Percentile(4))
    assert torch.equal(logits(compressed(model, method)), logits(compressed(model, plain)))


@pytest.mark.limit("repquant")
def test_reconstruction_without_epochs_rounds_to_nearest() -> None:
    model = model_of("vit")
    one = compressed(model, methods.repquant(softmax="none", clip="percentile", epochs=0))
    other = compressed(model, methods.repquant(softmax="none", clip="percentile", reconstruction="none"))
    assert torch.equal(logits(one), logits(other))


@pytest.mark.limit("dopq-vit")
def test_dopq_vit_with_the_mean_and_powers_of_the_root_is_repquant_without_its_own_parts() -> None:
    """Both are then RepQ-ViT."""
    model = model_of("vit")
    one = compressed(model, methods.dopq_vit(softmax="log_sqrt2", centre="mean"))
    other = compressed(model, methods.repquant(clip="percentile", reconstruction="none"))
    assert torch.equal(logits(one), logits(other))


@pytest.mark.limit("dopq-vit")
def test_the_median_is_a_whole_zero_point_and_with_it_integers_are_as_with_the_mean_rounded() -> None:
    """Card 028: for whole zero points the choice of the common scale cancels, but for one factor of the weights."""
    for centre in ("mean", "median"):
        model = compressed(uneven(), methods.dopq_vit(8, activation_bits=6, softmax="none", centre=centre))  # type: ignore[arg-type]
        query = model.get_submodule("vit.layers.0.attention.q_proj")
        step = query.inputs[0]  # type: ignore[index, union-attr]
        assert isinstance(step, StaticStep)
        assert step.scale.shape == ()
        assert float(step.zero) == round(float(step.zero))
    errors = [error(uneven(), methods.dopq_vit(8, softmax="none", centre=c)) for c in ("mean", "median")]  # type: ignore[arg-type]
    assert errors[0] == pytest.approx(errors[1], rel=0.35)


# -- what they are for


def test_folded_ranges_undo_what_large_channels_do() -> None:
    model = uneven()
    folded = methods.repquant(8, softmax="none", clip="percentile", reconstruction="none")
    one, apart = folded.replace(transforms=()), folded.replace(transforms=(Reparameterization(4, folded=False),))
    assert error(model, folded) < 0.6 * error(model, one)
    assert error(model, folded) == pytest.approx(error(model, apart), rel=0.2)


def test_learned_rounding_loses_less_than_the_nearest() -> None:
    """Of what it was learned on."""
    model: Any = model_of("vit")
    batch, errors = batches_of(model)[0], []
    options: tuple[dict[str, Any], ...] = ({"epochs": 25}, {"reconstruction": "none"})
    for each in options:
        method = methods.repquant(3, activation_bits=8, softmax="none", clip="percentile", **each)
        with torch.no_grad():
            errors.append(float((compressed(model, method, 3)(**batch).logits - model(**batch).logits).norm()))
    assert errors[0] < 0.8 * errors[1]


@pytest.mark.parametrize("name", ["opt", "llama", "mixtral", "gpt-neox"])
def test_they_run_on_language_models(name: str) -> None:
    wide: dict[str, Any] = {"activation_bits": 8, "softmax": "uniform"}
    for method in (methods.dopq_vit(8, **wide), methods.repquant(8, reconstruction="gptq", **wide)):
        assert error(uneven(name), method) < 0.2, method.name


def test_what_is_chosen() -> None:
    method = methods.repquant(group=16)
    assert isinstance(method.solver, BlockRounding)
    assert (method.solver.grid.group, method.calibration.samples) == (16, 32)
    assert methods.dopq_vit(tanq_center=0.7, tanq_beta=0.9).attention is not None
    model = compressed(model_of("vit"), methods.dopq_vit(3, activation_bits=3))
    found = [m for m in model.modules() if isinstance(m, AttentionRounding)]
    kinds = [{operand: type(steps[0]).__name__ for operand, steps in m.steps.items()} for m in found]  # type: ignore[index]
    assert kinds == [{**dict.fromkeys(("query", "key", "value"), "StaticStep"), "probabilities": "TangentStep"}] * 2


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda: methods.dopq_vit(softmax="tan"), "softmax is 'tan'; expected one of tangent, log_sqrt2"),  # type: ignore[arg-type]
        (lambda: methods.repquant(reconstruction="all"), "reconstruction is 'all'; expected one of block"),  # type: ignore[arg-type]
        (lambda: compress_model(m := model_of("bert"), methods.dopq_vit(), batches_of(m)), "cannot fold a scale into"),
    ],
)
def test_mistakes_are_told(wrong: Any, told: str) -> None:
    with pytest.raises(PosttrainError, match=told):
        wrong()
