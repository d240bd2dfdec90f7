"""The arms of decoding and of stability: their figures are those of the measures, on a tiny model of the lab."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from posttrain import lab, methods
from posttrain.lab import models
from posttrain.lab.models import ModelSpec, Share, World
from posttrain.studies import stability
from posttrain.studies.decoding import decoded, decoding_sensitivity_of_quantizers
from posttrain.studies.stability import cut, reduced_precision, trained_in

MIXED = World("mixed")
TINY = ModelSpec("mixed", MIXED, (Share(World("pages")),), hidden=32, layers=1, heads=2, rows=16, steps=2, batch=8)

DECODED = {"quality", "std", "excess", "drop", "falls", "flips"} | {
    f"{figure} at {temperature}" for figure in ("kl", "variation", "entropy") for temperature in ("0.1", "0.5", "1")
}
TRAINED = {"loss", "loss x10", "stable", "diverged", "spikes", "sharpness"}  # of a quick run, which has two rates


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path))
    monkeypatch.setattr(models, "PROBLEMS", 8)
    monkeypatch.setattr(models, "SAMPLES", 2)
    monkeypatch.setitem(lab.PRESETS, "mixed", TINY)


def run(arm: Any, seed: int = 0, quick: bool = True) -> Any:
    return arm.run(seed, quick, **arm.arguments)


def test_decoded_figures():
    found = run(decoded(methods.rtn(3, 16)))
    assert set(found.figures) == DECODED
    assert found.figures["kl at 0.5"] - found.figures["kl at 1"] == pytest.approx(found.figures["falls"])
    assert found.figures["kl at 1"] > 0
    plain = run(decoded(None))
    assert set(plain.figures) == {"quality", "std", "excess", "drop"}
    assert plain.figures["excess"] == 0


def test_trained_in_figures(monkeypatch):
    monkeypatch.setattr(stability, "ROWS", 32)
    found = run(trained_in(cut(8, 3), steps=3))
    assert set(found.figures) == TRAINED
    assert 3 < found.figures["loss"] < 6, "near the logarithm of the vocabulary, before it has learned anything"
    assert found.figures["sharpness"] > 0
    assert {name.split()[0] for name in found.curves} == {"loss", "sharpness"}
    other = run(trained_in(None, steps=3))
    assert other.figures["loss"] != found.figures["loss"]


@pytest.mark.parametrize(
    ("made", "figures"),
    [
        (decoding_sensitivity_of_quantizers, DECODED),
        (reduced_precision, TRAINED | {"loss x3"}),
    ],
)
def test_expectations_speak_of_figures_that_the_arms_have(made, figures):
    study = made()
    assert {expectation.metric for expectation in study.expectations} <= figures
    assert len({arm.identity for arm in study.arms.values()}) == len(study.arms)


def test_the_model_of_the_stability_study_is_not_the_labs():
    assert dataclasses.replace(stability.small(), name="mixed", layers=TINY.layers) == TINY
    assert stability.small().layers == 2
