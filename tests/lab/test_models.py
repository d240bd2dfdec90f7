"""Building models: by seed, once, under a key that knows what a model depends on; and real presets with headroom."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from posttrain import lab
from posttrain.lab import models
from posttrain.lab.models import HEADROOM, ModelSpec, Share, World, build, corpus, folder_of, headroom, initial
from posttrain.models.load import load
from posttrain.rollout.engine_choice import engine_for
from posttrain.rollout.rollout import rollout
from posttrain.trajectory import PosttrainError, Sampling

SORT = World("rewriting", {"operation": "sort", "length": (3, 4)})
TINY = ModelSpec("tiny", SORT, (Share(SORT),), hidden=16, layers=1, heads=2, rows=40, steps=3, batch=8)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path))
    monkeypatch.setattr(models, "PROBLEMS", 10)
    monkeypatch.setattr(models, "SAMPLES", 4)
    return tmp_path


def weights(policy):
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values(), strict=True))


def test_a_model_is_built_once(monkeypatch):
    first = build(TINY)
    monkeypatch.setattr(models, "Trainer", lambda *given, **named: pytest.fail("built again"))
    second = build(TINY)
    assert equal(first, second)
    assert first.model is not second.model
    assert first.name == "lab:tiny"
    assert first.dtype == torch.float32
    assert first.max_length == 256
    kept = json.loads((folder_of(TINY) / HEADROOM).read_text())
    assert kept["steps"] == 3
    assert kept["parameters"] == sum(p.numel() for p in first.model.parameters())
    assert headroom(TINY).accuracy == kept["accuracy"]


def test_the_seed_decides_the_weights(tmp_path, monkeypatch):
    one = build(TINY)
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path / "elsewhere"))
    torch.manual_seed(5)
    again, other = build(TINY), build(TINY, seed=1)
    assert equal(one, again)
    assert not equal(one, other)
    assert other.name == "lab:tiny@1"


def test_the_callers_random_state_stays():
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    build(TINY)
    assert torch.equal(torch.rand(3), expected)


def test_training_learns_from_the_completions():
    spec = dataclasses.replace(TINY, steps=40, learning_rate=1e-2)
    before, after = (_loss(p) for p in (initial(spec), build(spec)))
    assert after < 0.8 * before


def _loss(policy):
    from posttrain.objective.batch import Batch

    with torch.no_grad():
        return -float(policy.log_likelihood(Batch.of(corpus(TINY))).logp.mean())


@pytest.mark.parametrize(
    "changed",
    [{"hidden": 32}, {"steps": 4}, {"seed": 1}, {"corpus": (Share(World("rewriting")),)}, {"until": 0.5}],
)
def test_the_key_knows_the_specification(changed):
    assert dataclasses.replace(TINY, **changed).key != TINY.key
    assert dataclasses.replace(TINY).key == TINY.key


def test_the_key_knows_the_code_of_its_worlds(monkeypatch):
    names = {m.__name__.rpartition(".")[2] for m in TINY._modules()}
    assert {"tokenizer", "world", "rewriting", "mixture", "arithmetic"} <= names
    assert "facts" not in names
    key = TINY.key
    monkeypatch.setattr(models, "initial", corpus)
    assert TINY.key != key
    monkeypatch.undo()
    assert TINY.key == key
    monkeypatch.setattr("posttrain.lab.worlds.mixture.__file__", models.__file__)
    assert TINY.key != key


def test_a_failed_build_leaves_nothing(home, monkeypatch):
    def fail(spec):
        raise RuntimeError("killed")

    monkeypatch.setattr(models, "measure", lambda *args, **options: fail(None))
    with pytest.raises(RuntimeError):
        build(TINY)
    assert [p.name for p in (home / "lab").iterdir() if p.is_dir()] == []


def test_a_half_made_folder_is_made_again(home):
    folder = home / "lab" / f"tiny-0-{TINY.key}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert build(TINY).max_length == 256


def test_pretraining_stops_at_the_accuracy_asked_for(monkeypatch):
    seen = []

    def accuracy(policy, task, *, samples, seed=0):
        seen.append(samples)
        return models.Headroom(0.1 * len(seen), 1.0, {"x": 0.0})

    monkeypatch.setattr(models, "measure", accuracy)
    spec = dataclasses.replace(TINY, steps=60, until=0.3, check_every=2)
    _, found = models.pretrain(spec)
    assert found.steps == 6
    assert seen == [2, 2, 2, 4]


def test_shares_of_a_corpus():
    parts = (Share(World("rewriting", {"name": "a"}), 3.0), Share(World("arithmetic"), 1.0))
    groups = corpus(dataclasses.replace(TINY, corpus=parts))
    assert len(groups) == 40
    assert sum(g.prompt.meta["domain"] == "a" for g in groups) == 30
    with pytest.raises(PosttrainError, match="shares"):
        corpus(dataclasses.replace(TINY, corpus=()))


def test_a_mixture_of_experts_samples_and_scores():
    policy = initial(dataclasses.replace(TINY, experts=4))
    assert policy.base.config.num_local_experts == 4
    prompts = SORT.task(train=3, heldout=0).prompts(policy.tokenizer, "train")
    groups = rollout(engine_for(policy), prompts, 2, Sampling(max_tokens=4), 0)
    assert all(t.actions for g in groups for t in g.trajectories)


def test_presets_are_complete():
    wanted = {
        "tiers", "working", "words", "logic", "facts", "formats", "styles", "turns", "moe", "strong", "weak",
        "three-tasks",
    }  # fmt: skip
    assert wanted <= set(lab.PRESETS)
    for name, spec in lab.PRESETS.items():
        assert spec.name == name
        assert lab.task(name, train=6, heldout=6).heldout
        assert len(corpus(dataclasses.replace(spec, rows=20))) >= 18
        task = lab.task(name, train=0, heldout=20)
        longest = max(len(p.tokens) for p in task.prompts(models.character_tokenizer(), "heldout"))
        assert longest + task.sampling.max_tokens < 100


def test_ids_of_the_lab(monkeypatch):
    monkeypatch.setitem(lab.PRESETS, "tiny", TINY)
    assert equal(load("lab:tiny"), build(TINY))
    assert load("lab:tiny").dtype == torch.float32
    assert load("lab:tiny", precision="bf16").dtype == torch.bfloat16
    assert equal(load("lab:tiny@2"), build(TINY, seed=2))
    with pytest.raises(PosttrainError, match="tiers"):
        load("lab:tires")
    with pytest.raises(PosttrainError, match="whole number"):
        load("lab:tiny@x")
    with pytest.raises(PosttrainError, match="tiers"):
        lab.task("teirs")


@pytest.mark.lab
@pytest.mark.parametrize("name", ["weak", "working"])
def test_real_presets_have_headroom(name, monkeypatch):
    monkeypatch.setattr(models, "PROBLEMS", 150)
    monkeypatch.setattr(models, "SAMPLES", 8)
    lab.model(name)
    found = lab.headroom(lab.PRESETS[name])
    assert 0.1 <= found.accuracy <= 0.6
    assert found.best_of > found.accuracy + 0.2
    assert found.parameters < 5_000_000
