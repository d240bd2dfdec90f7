"""Rounding inside a state-space mixer: ranges against computations written here, and known limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from block_models import batches_of, model_of
from posttrain.compress.activations.scan import ScanRounding
from posttrain.compress.activations.static import StaticStep
from posttrain.compress.stacks import stacks
from posttrain.compress.walk import Block, Walk
from posttrain.models.mixers import Mixer, take_apart
from posttrain.trajectory import PosttrainError


def mamba_block(rows: int = 3, count: int = 2) -> tuple[Block, Mixer]:
    model = model_of("mamba")
    take_apart(model)
    block = next(iter(Walk(model, stacks(model)[0], batches_of(model, rows, count=count))))
    mixer = block.module.get_submodule("mixer")
    assert isinstance(mixer, Mixer)
    return block, mixer


def places(block: Block, mixer: Mixer) -> dict[str, Tensor]:
    """`[sequences, ...]` what is at each place over all calls; of the state, all tokens'."""
    found: dict[str, list[Tensor]] = {}
    joined: dict[str, list[Tensor]] = {}
    for call in block.inputs:
        found.clear()
        mixer.watch = lambda place, tensor: found.setdefault(place, []).append(tensor)
        block.outputs([call])
        for place, parts in found.items():
            joined.setdefault(place, []).append(torch.stack(parts, 1))
    mixer.watch = None
    return {place: torch.cat(parts) for place, parts in joined.items()}


def step_of(mixer: Mixer, place: str) -> StaticStep:
    step: Any = mixer.rounding[place][0]  # type: ignore[index]
    assert isinstance(step, StaticStep)
    return step


@pytest.mark.limit("quamba")
def test_ranges_are_the_largest_and_running_means_of_quantiles() -> None:
    block, mixer = mamba_block()
    seen = places(block, mixer)
    ScanRounding(8, 0, quantile=0.9, rate=0.25, state_bits=6).fit_block(block)
    assert list(mixer.rounding) == ["projected", "scanned", "selected", "steps", "state"]
    for place in ("projected", "selected", "steps"):
        assert float(step_of(mixer, place).scale) == pytest.approx(float(seen[place].abs().max()) / 127)
    for place, top in (("scanned", 127), ("state", 31)):
        own = [float(np.quantile(row.abs().numpy(), 0.9)) for row in seen[place]]
        mean = own[0]
        for value in own[1:]:
            mean += 0.25 * (value - mean)
        assert len(own) == 6
        assert float(step_of(mixer, place).scale) == pytest.approx(mean / top, rel=1e-4), place


@pytest.mark.limit("quamba")
def test_with_one_sequence_and_all_of_it_the_quantile_is_the_largest() -> None:
    scales = []
    for quantile in (1.0, None):
        block, mixer = mamba_block(rows=1, count=1)
        ScanRounding(8, 0, quantile=quantile).fit_block(block)
        scales.append(step_of(mixer, "scanned").scale)
    assert torch.equal(*scales)
    block, mixer = mamba_block(rows=1, count=1)
    ScanRounding(8, 0, quantile=0.9).fit_block(block)
    assert step_of(mixer, "scanned").scale < 0.9 * scales[0]


@pytest.mark.limit("quamba")
def test_many_bits_change_nothing() -> None:
    block, _ = mamba_block()
    before = block.outputs()
    ScanRounding(16, 16, quantile=1.0, rate=1e-9, state_bits=16).fit_block(block)
    largest = ScanRounding(16, 16, quantile=None, state_bits=16)
    block, mixer = mamba_block()
    largest.fit_block(block)
    for found, wanted in zip(block.outputs(), before, strict=True):
        assert (found - wanted).abs().max() < 1e-3 * wanted.abs().max()
    assert set(mixer.rounding) == {"projected", "scanned", "selected", "steps", "state"}


def test_layers_get_the_steps_that_are_theirs() -> None:
    block, _ = mamba_block()
    ScanRounding(8).fit_block(block)
    kinds = {name.rpartition(".")[2]: type(step).__name__ for name, step in block.quantizers.items()}
    assert kinds == {"in_proj": "StaticStep", "x_proj": "NoneType", "dt_proj": "NoneType", "out_proj": "StaticStep"}


def test_what_is_no_matrix_is_rounded_in_place() -> None:
    block, mixer = mamba_block()
    was = {n: p.clone() for n, p in mixer.named_parameters(recurse=False)} | {"conv": mixer.conv1d.weight.clone()}
    ScanRounding(8, 4).fit_block(block)
    now = dict(mixer.named_parameters(recurse=False)) | {"conv": mixer.conv1d.weight}
    assert set(was) == {"A_log", "D", "dt_bias", "conv"}
    for name, before in was.items():
        step = before.abs().max() / 7
        assert torch.allclose(now[name], (before / step).round().clamp(-8, 7) * step, atol=1e-6), name
        assert not torch.equal(now[name], before)


def test_errors_of_x_are_carried_on_but_do_not_grow() -> None:
    """The probe of card 142: with x alone rounded, the state's error saturates, and is in proportion to the step."""
    errors = []
    for bits in (4, 8):
        block, mixer = mamba_block(rows=4, count=1)
        truth = places(block, mixer)["state"]
        ScanRounding(bits, 0, quantile=None).fit_block(block)
        for place in ("projected", "selected", "steps"):
            del mixer.rounding[place]
        errors.append((places(block, mixer)["state"] - truth).flatten(2).norm(dim=2).mean(0))
    assert 8 < float(errors[0].mean() / errors[1].mean()) < 32  # steps are 127 / 7 as wide
    assert float(errors[0][-3:].mean()) < 3 * float(errors[0][3:6].mean())


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"quantile": 0.2}, "quantile is 0.2; expected a share"),
        ({"rate": 0.0}, "rate is 0.0; expected the weight of a new value"),
        ({"state_bits": 1}, "2 to 16"),
    ],
)
def test_mistakes_are_told(wrong: dict[str, Any], told: str) -> None:
    with pytest.raises(PosttrainError, match=told):
        ScanRounding(8, **wrong)
