"""The arm of the sentence encoder: what it measures, and what follows the seed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain import methods
from posttrain.lab import hasty
from posttrain.lab.encoder import sentences
from posttrain.studies import encoder as studies
from posttrain.studies.encoder import agreement, drawn, encoded

FIGURES = {"ranking", "neighbours", "drift", "bits", "error", "seconds"}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path))
    monkeypatch.setattr(studies, "HELDOUT", 16)


def run(arm: Any, seed: int = 0, quick: bool = False) -> dict[str, float]:
    with hasty():
        found: dict[str, float] = arm.run(seed, quick, **arm.arguments).figures
    return found


def test_fewer_bits_drift_further() -> None:
    eight, two = run(encoded(methods.rtn(8, 0), calibration=8)), run(encoded(methods.rtn(2, 0), calibration=8))
    assert set(eight) == FIGURES == set(run(encoded(methods.rtn(8, 0), calibration=8), quick=True))
    assert 0 < eight["drift"] < 0.01 * two["drift"]
    assert eight["ranking"] > two["ranking"]
    assert eight["ranking"] > 0.99
    assert run(encoded(methods.rtn(2, 0), calibration=8))["drift"] == two["drift"]


def test_text_follows_the_seed_and_calibration_is_apart_from_what_is_measured() -> None:
    one, other = drawn(0, 30, 40), drawn(1, 30, 40)
    assert one == drawn(0, 30, 40) != other
    middle = len(sentences()) // 2
    for calibration, heldout in (one, other):
        assert len(set(calibration)) == 30
        assert len(set(heldout)) == 40
        assert set(calibration) <= set(sentences()[:middle])
        assert set(heldout) <= set(sentences()[middle:])
    arm = encoded(methods.gptq(3, 16), calibration=8)
    assert run(arm, 0)["drift"] != run(arm, 1)["drift"] != run(encoded(methods.gptq(3, 16), calibration=9), 1)["drift"]


def test_agreement_knows_equal_and_reversed_rankings() -> None:
    angles = torch.tensor([0.0, 0.1, 0.3, 0.7])
    truth = torch.stack([angles.cos(), angles.sin()], -1)
    assert agreement(truth, truth) == pytest.approx({"ranking": 1.0, "neighbours": 1.0})
    spread = torch.stack([(2 * angles).cos(), (2 * angles).sin()], -1)
    assert agreement(truth, spread)["ranking"] == pytest.approx(1.0), "angles twice as wide rank pairs alike"
    others = truth[[0, 3, 2, 1]]
    assert agreement(truth, others)["ranking"] < 0.5
    assert agreement(truth, others)["neighbours"] < 1
