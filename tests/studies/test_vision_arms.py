"""The arm of vision models: what it measures, what follows the seed, and what is planted."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from posttrain import methods
from posttrain.lab import vision
from posttrain.lab.images import images
from posttrain.lab.vision import VisionSpec, logits
from posttrain.studies import vision as studies
from posttrain.studies.second_look_compression import again
from posttrain.studies.vision import large_norm_channels, quantized

TINY = VisionSpec("tiny", hidden=32, layers=2, heads=4, steps=3, batch=8)
FIGURES = {"accuracy", "float_accuracy", "kl", "agreement", "bits", "error", "seconds"}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path))
    monkeypatch.setattr(vision, "PATTERNS", TINY)
    monkeypatch.setattr(vision, "MEASURED", 20)
    monkeypatch.setattr(studies, "HELDOUT", 60)


def run(arm: Any, seed: int = 0, quick: bool = False) -> Any:
    return arm.run(seed, quick, **arm.arguments)


def test_the_figures_are_those_of_the_model_of_the_seed():
    found = run(quantized(methods.rtn(bits=3, group=16)), seed=1)
    assert set(found.figures) == FIGURES
    given = images(60, 0, "heldout")
    truth = logits(vision.vision_model(TINY, 1), given.pixels)
    assert found.figures["float_accuracy"] == pytest.approx(float((truth.argmax(-1) == given.labels).float().mean()))
    assert found.figures["bits"] == pytest.approx(3 + 19 / 16)
    assert found.figures["kl"] > 0
    eight = run(quantized(methods.rtn(bits=8, group=0)), seed=1)
    assert eight.figures["kl"] < 0.1 * found.figures["kl"]
    assert run(quantized(methods.rtn(bits=3, group=16)), seed=1).figures["kl"] == found.figures["kl"]
    assert set(run(quantized(methods.rtn(bits=8, group=0)), quick=True).figures) == FIGURES


def test_calibration_follows_the_seed_beyond_the_model():
    arm = quantized(methods.dopq_vit())
    one, other = (run(arm, seed).figures for seed in (0, 3))
    assert one["float_accuracy"] == other["float_accuracy"]
    assert one["kl"] != other["kl"]


def test_another_number_of_models_and_of_images():
    plain, method = quantized(methods.dopq_vit()), methods.dopq_vit()
    one, other = (run(quantized(method, models=2), seed).figures for seed in (0, 2))
    assert one["float_accuracy"] == other["float_accuracy"] != run(plain, 2).figures["float_accuracy"]
    assert run(quantized(method, calibration=8)).figures["kl"] != run(plain).figures["kl"]
    second = again(quantized(method, calibration=8))
    assert run(second).figures["kl"] == run(quantized(method, models=6, calibration=8), seed=3).figures["kl"]


def test_planted_channels_leave_the_function():
    model = vision.vision_model(TINY)
    pixels = images(5).pixels
    before, gain = logits(model, pixels), model.vit.layers[0].layernorm_before.weight.clone()
    large_norm_channels(model, 0)
    assert torch.allclose(logits(model, pixels), before, atol=1e-4)
    ratio = model.vit.layers[0].layernorm_before.weight / gain
    assert int((ratio > 10).sum()) == 4


def test_what_makes_another_arm(monkeypatch):
    arm = quantized(methods.dopq_vit())
    others = [quantized(methods.dopq_vit(centre="mean")), quantized(methods.dopq_vit(), large_norm_channels)]
    assert len({arm.identity, *(other.identity for other in others)}) == 3
    monkeypatch.setattr(vision, "PATTERNS", dataclasses.replace(TINY, steps=4))
    assert quantized(methods.dopq_vit()).identity != arm.identity
