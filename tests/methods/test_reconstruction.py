"""Methods that learn rounding, ranges and steps: the limits in which each is something known."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from posttrain import methods
from posttrain.compress.method import Compression
from posttrain.compress.packed.levels import LevelsWeight
from posttrain.compress.packed.linear import PackedLinear
from posttrain.compress.packed.low_rank import LowRankWeight
from posttrain.compress.pipeline import compress_model
from posttrain.compress.solvers.abq import ArbitraryBit
from posttrain.compress.solvers.l4q import first_levels
from posttrain.compress.solvers.lsq import initial_step
from posttrain.compress.transforms.outliers import OutlierScaling
from tiny_blocks import GROUP, floats, text, tiny, weights

GRID: dict[str, Any] = {"bits": 3, "group": GROUP}


def made(method: Compression, **options: Any) -> nn.Module:
    model = tiny(**options)
    compress_model(model, method, text())
    return model


def alike(one: nn.Module, other: nn.Module) -> bool:
    found, wanted = weights(one), weights(other)
    return found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


@pytest.mark.limit("adaround", "brecq")
def test_learned_rounding_without_a_step_is_rounding_to_nearest() -> None:
    one = {"num_hidden_layers": 1}
    wanted = made(methods.rtn(**GRID, clip="mse"), **one)
    assert alike(made(methods.adaround(**GRID, steps=0), **one), wanted)
    assert alike(made(methods.brecq(**GRID, epochs=0), **one), wanted)
    assert not alike(made(methods.adaround(**GRID, steps=20, rate=0.5), **one), wanted)


@pytest.mark.limit("omniquant")
def test_the_whole_range_is_rounding_to_nearest() -> None:
    """At σ = 1 instead of σ(4), untrained."""
    method = methods.omniquant(**GRID, epochs=0)
    whole = method.replace(solver=type(method.solver)(method.solver.grid, 0, start=30.0))  # type: ignore[attr-defined, call-arg]
    assert alike(made(whole), made(methods.rtn(**GRID)))
    assert not alike(made(method), made(methods.rtn(**GRID)))


@pytest.mark.limit("lsq")
def test_untrained_steps_are_twice_the_mean_size_over_the_root_of_the_highest_level() -> None:
    plain = floats(tiny())
    for name, found in weights(made(methods.lsq(**GRID, epochs=0))).items():
        by_group = plain[name].view(len(found), -1, GROUP)
        scale = initial_step(by_group, 3).half().float()[..., None]
        assert torch.equal(found, ((by_group / scale).round().clamp(-4, 3) * scale).view(found.shape))


@pytest.mark.limit("cbq")
def test_without_training_and_outliers_cross_block_is_rounding_to_nearest() -> None:
    plain = {"truncate": False, "scale": False, "epochs": 0}
    wanted = made(methods.rtn(**GRID, clip="mse"))
    for window, overlap in ((1, 0), (2, 1)):
        method = methods.cbq(**GRID, window=window, overlap=overlap, **plain)  # type: ignore[arg-type]
        assert alike(made(method), wanted)
    assert isinstance(methods.cbq().transforms[0], OutlierScaling)


@pytest.mark.limit("abq-llm")
def test_without_its_losses_it_is_omniquant() -> None:
    """Four levels and no correction, untrained: the same range, the same codes. With balance, five levels."""
    method = methods.abq_llm(**GRID, balance=False, correction=0.0, epochs=0)
    assert alike(made(method), made(methods.omniquant(**GRID, epochs=0)))
    five = made(methods.abq_llm(bits=2, group=GROUP, epochs=1))
    for layer in (m for m in five.modules() if isinstance(m, PackedLinear)):
        assert isinstance(layer.weight, LevelsWeight)
        assert layer.weight.levels == 5


def test_arbitrary_bits_of_weights_and_inputs() -> None:
    for bits, activation_bits in ((1, 4), (3, 8), (6, 6)):
        method = methods.abq_llm(bits=bits, group=0, activation_bits=activation_bits, epochs=1)
        assert isinstance(method.solver, ArbitraryBit)
        layers = [m for m in made(method).modules() if isinstance(m, PackedLinear)]
        assert all(layer.inputs is not None and layer.inputs[0].bits == activation_bits for layer in layers)


@pytest.mark.limit("sapr")
def test_without_penalty_and_adapter_it_is_omniquant_with_the_augmented_loss() -> None:
    method = methods.sapr(**GRID, rank=0, penalty=0.0, epochs=0)
    assert alike(made(method), made(methods.omniquant(**GRID, augmented=True, epochs=0)))
    adapted = made(methods.sapr(**GRID, rank=2, epochs=1))
    for layer in (m for m in adapted.modules() if isinstance(m, PackedLinear)):
        assert isinstance(layer.weight, LowRankWeight)


@pytest.mark.limit("l4q")
@pytest.mark.parametrize("rank", [0, 4])
def test_without_training_it_is_rounding_on_the_first_levels(rank: int) -> None:
    plain = floats(tiny())
    for name, found in weights(made(methods.l4q(**GRID, rank=rank, offset=False, epochs=0))).items():
        by_group = plain[name].view(len(found), -1, GROUP)
        scale = first_levels(by_group, 3, "cover")[0].half().float()[..., None]
        assert torch.equal(found, ((by_group / scale).round().clamp(-4, 3) * scale).view(found.shape))


@pytest.mark.parametrize("name", ["omniquant", "adaround", "brecq", "lsq", "cbq", "abq-llm", "sapr", "l4q"])
def test_every_method_compresses_a_model_whole(name: str) -> None:
    short = {"steps": 3} if name == "adaround" else {"epochs": 1}
    model = made(methods.find(name).function(bits=2, group=GROUP, **short), num_hidden_layers=1)
    assert weights(model).keys() == floats(tiny(num_hidden_layers=1)).keys()
    for layer in (m for m in model.modules() if isinstance(m, PackedLinear)):
        assert torch.isfinite(layer.weight.dequantize()).all()
