"""Mambas of the lab: built once by seed, trained with their mixers taken apart, and kept as `transformers` has them."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from posttrain import lab
from posttrain.lab import mamba
from posttrain.lab.mamba import MambaSpec, initial, trained
from posttrain.lab.models import Share, World, build, corpus
from posttrain.models.load import load
from posttrain.objective.batch import Batch

SORT = World("rewriting", {"operation": "sort", "length": (3, 4)})
TINY = MambaSpec("tiny-mamba", SORT, (Share(SORT),), hidden=16, layers=1, rows=40, steps=3, batch=8, states=4)


def test_a_model_is_built_once_by_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path))
    monkeypatch.setattr(mamba, "PROBLEMS", 4)
    one = build(TINY)
    assert type(one.model).__name__ == "MambaForCausalLM"
    assert type(one.model.backbone.layers[0].mixer).__name__ == "MambaMixer"
    monkeypatch.setattr(mamba, "Trainer", lambda *given, **named: pytest.fail("built again"))
    again = build(TINY)
    tokens = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(again.model(tokens, use_cache=False).logits, one.model(tokens, use_cache=False).logits)
    assert lab.headroom(TINY).steps == 3
    monkeypatch.setitem(lab.PRESETS, "tiny-mamba", TINY)
    assert load("lab:tiny-mamba").name == "lab:tiny-mamba"


def test_training_learns_from_the_completions() -> None:
    spec = dataclasses.replace(TINY, steps=40, learning_rate=1e-2)

    def loss(policy: object) -> float:
        with torch.no_grad():
            return -float(policy.log_likelihood(Batch.of(corpus(TINY))).logp.mean())  # type: ignore[attr-defined]

    assert loss(trained(spec)) < 0.9 * loss(initial(spec))


@pytest.mark.parametrize("changed", [{"states": 8}, {"steps": 4}, {"seed": 1}])
def test_the_key_knows_the_specification(changed: dict[str, int]) -> None:
    assert dataclasses.replace(TINY, **changed).key != TINY.key  # type: ignore[arg-type]
    plain = {f.name: getattr(TINY, f.name) for f in dataclasses.fields(lab.ModelSpec)}
    assert lab.ModelSpec(**plain).key != TINY.key
