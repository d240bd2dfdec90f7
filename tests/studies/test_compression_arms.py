"""The arm of compression: what it measures, what follows the seed, and what makes it another arm."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from posttrain import lab, methods
from posttrain.compress.policy import CompressedPolicy
from posttrain.evaluation.perplexity import predict
from posttrain.lab import models, text
from posttrain.lab.models import ModelSpec, Share, World
from posttrain.models.causal import CausalPolicy
from posttrain.studies.compression import LabText, compressed, texts_for, uncompressed
from posttrain.studies.second_look_compression import AGAIN, again, again_for
from posttrain.studies.verdict import Less

SORT = World("rewriting", {"operation": "sort", "length": (3, 4)})
TINY = ModelSpec("tiny", SORT, (Share(SORT),), hidden=32, layers=1, heads=2, rows=40, steps=3, batch=8)
FIGURES = {"perplexity", "float_perplexity", "kl", "accuracy", "bits", "error", "seconds"}
SMALL: dict[str, Any] = {"model": "lab:tiny", "samples": 12, "rows": 10, "problems": 6}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path))
    monkeypatch.setattr(models, "PROBLEMS", 10)
    monkeypatch.setattr(models, "SAMPLES", 4)
    monkeypatch.setitem(lab.PRESETS, "tiny", TINY)


def scaled(policy: CausalPolicy, seed: int) -> CausalPolicy:
    """A preparation that does change the model, so that it can be seen."""
    with torch.no_grad():
        policy.model.model.norm.weight.mul_(2 + seed)
    return policy


def layers(small: CompressedPolicy, policy: CausalPolicy) -> dict[str, float]:
    assert not isinstance(policy, CompressedPolicy)
    return {"layers": float(len(small.compression.layers))}


def run(arm: Any, seed: int = 0, quick: bool = False) -> Any:
    return arm.run(seed, quick, **arm.arguments)


def test_the_figures_are_those_of_the_model_of_the_seed():
    found = run(compressed(methods.gptq(bits=3, group=16), extra=layers, **SMALL), seed=1)
    assert set(found.figures) == FIGURES | {"layers"}
    unseen = predict(lab.model("tiny", 1), text.heldout(TINY, 10))
    assert found.figures["float_perplexity"] == pytest.approx(unseen.perplexity)
    assert found.figures["bits"] == pytest.approx(3 + 19 / 16)
    assert found.figures["layers"] == 7
    assert found.figures["kl"] > 0
    assert 0 < found.figures["error"] < 0.5
    assert found.seconds == found.figures["seconds"] > 0
    assert found.tokens > 12


def test_it_is_the_same_each_time_and_another_with_each_seed():
    arm = compressed(methods.gptq(bits=2, group=16), models=2, **SMALL)
    one, again, other, third = (run(arm, seed) for seed in (0, 0, 1, 2))
    assert one.figures["perplexity"] == again.figures["perplexity"]
    assert one.figures["float_perplexity"] == third.figures["float_perplexity"] != other.figures["float_perplexity"]
    assert one.figures["perplexity"] != third.figures["perplexity"], "the calibration is another"


def test_the_float_model_as_an_arm():
    found = run(uncompressed(model="tiny", rows=10, problems=6))
    assert set(found.figures) == FIGURES
    assert found.figures["perplexity"] == found.figures["float_perplexity"]
    assert (found.figures["kl"], found.figures["bits"], found.figures["error"]) == (0, 32, 0)


def test_what_is_prepared_counts_as_the_float_model():
    plain, changed = (run(compressed(methods.rtn(bits=8, group=0), prepare=p, **SMALL)) for p in (None, scaled))
    assert plain.figures["float_perplexity"] != changed.figures["float_perplexity"]
    assert changed.figures["kl"] < 0.05


def test_quick_is_small():
    found = run(compressed(methods.rtn(bits=4, group=16), model="tiny"), seed=2, quick=True)
    assert set(found.figures) == FIGURES
    assert found.figures["float_perplexity"] == predict(lab.model("tiny", 0), text.heldout(TINY, 8)).perplexity


def test_what_makes_another_arm(monkeypatch):
    arm = compressed(methods.gptq(bits=3, group=16), model="tiny")
    assert arm.identity == compressed(methods.gptq(bits=3, group=16), model="lab:tiny").identity
    others = [
        compressed(methods.gptq(bits=2, group=16), model="tiny"),
        compressed(methods.gptq(bits=3, group=16, damping=0.02), model="tiny"),
        compressed(methods.gptq(bits=3, group=16), model="weak"),
        compressed(methods.gptq(bits=3, group=16), model="tiny", samples=5),
        compressed(methods.gptq(bits=3, group=16), model="tiny", prepare=scaled),
        uncompressed(model="tiny"),
    ]
    assert len({arm.identity, *(other.identity for other in others)}) == 1 + len(others)
    monkeypatch.setitem(lab.PRESETS, "tiny", ModelSpec("tiny", SORT, (Share(SORT),), hidden=64))
    assert compressed(methods.gptq(bits=3, group=16), model="tiny").identity != arm.identity


def test_text_where_none_is_given():
    policy = lab.model("tiny")
    assert isinstance(texts_for(policy), LabText)
    found = texts_for(policy, ["0123456789" * 20])
    assert found.calibrated_on == "the texts given but for the last tenth"
    policy.name = "elsewhere"
    assert texts_for(policy).measured_on == "the last tenth of problems of the lab with their solutions"


@pytest.mark.lab
def test_the_real_model_predicts_well_and_can_be_compressed():
    arms = {
        "four": compressed(methods.gptq(bits=4, group=64), rows=50, problems=60, samples=32),
        "two": compressed(methods.gptq(bits=2, group=64), rows=50, problems=60, samples=32),
        "nearest": compressed(methods.rtn(bits=2, group=64), rows=50, problems=60, samples=32),
    }
    found = {name: run(arm).figures for name, arm in arms.items()}
    float_perplexity = found["four"]["float_perplexity"]
    assert float_perplexity < 2
    assert found["four"]["accuracy"] > 0.25
    assert found["four"]["perplexity"] < 1.01 * float_perplexity
    assert 1.02 * float_perplexity < found["two"]["perplexity"] < 0.9 * found["nearest"]["perplexity"]


def test_again_is_on_seeds_that_the_first_study_did_not_have():
    first = compressed(methods.rtn(bits=3, group=16), **SMALL)
    second = again(first)
    assert second.identity != first.identity
    found = run(second, seed=1)
    assert found.figures["float_perplexity"] == pytest.approx(
        predict(lab.model("tiny", 4), text.heldout(TINY, 10)).perplexity
    )
    assert (
        found.figures["kl"] == run(compressed(methods.rtn(bits=3, group=16), models=5, **SMALL), seed=4).figures["kl"]
    )


def test_again_for_takes_what_something_is_expected_of():
    arms = {str(bits): compressed(methods.rtn(bits=bits, group=16), **SMALL) for bits in (2, 3, 4)}
    found = again_for(arms, "Three bits lose less than two.", "a tiny model", Less("3", than="2", metric="kl"))
    assert found.arms == {"2": again(arms["2"]), "3": again(arms["3"])}
    assert (found.seeds, found.setting) == (6, f"a tiny model; {AGAIN}")
