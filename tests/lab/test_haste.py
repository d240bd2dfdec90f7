"""Models made hastily: beside the real ones, never in their place, and only where they are asked for."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest

from posttrain import lab
from posttrain.lab import haste, mamba, models, vision
from posttrain.lab.cache import kept
from posttrain.lab.mamba import MambaSpec
from posttrain.lab.models import ModelSpec, Share, World, build, corpus, folder_of, headroom
from posttrain.lab.vision import VisionSpec, vision_model

SORT = World("rewriting", {"operation": "sort", "length": (3, 4)})
TINY = ModelSpec("tiny", SORT, (Share(SORT),), hidden=16, layers=1, heads=2, rows=40, steps=5, batch=8)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path))
    monkeypatch.setattr(models, "PROBLEMS", 12)
    monkeypatch.setattr(models, "SAMPLES", 2)
    monkeypatch.setattr(haste, "STEPS", 2)
    return tmp_path / "lab"


def folders(home: Path) -> set[str]:
    return {p.name for p in home.iterdir() if p.is_dir()}


def test_a_hasty_model_has_a_name_of_its_own(home: Path) -> None:
    with lab.hasty():
        made = folder_of(TINY)
        assert (headroom(TINY).steps, headroom(TINY).prompts) == (2, haste.PROBLEMS)
        assert build(TINY).name == "lab:tiny"
        assert folder_of(TINY) == made
    assert made.name == f"tiny-0-{models.hastened(TINY).key}-hasty"
    assert folders(home) == {made.name}


def test_a_real_one_is_never_a_hasty_one(home: Path) -> None:
    with lab.hasty():
        made = folder_of(TINY)
        with lab.hasty(False):
            real = folder_of(TINY)
        assert folder_of(TINY) == real, "one that is there already is better"
    assert real.name == f"tiny-0-{TINY.key}"
    assert (headroom(TINY).steps, headroom(TINY).prompts) == (5, 12)
    assert folders(home) == {real.name, made.name}


def test_a_half_made_real_one_is_not_taken(home: Path) -> None:
    (home / "thing").mkdir(parents=True)

    def make(scratch: Path) -> Path:
        (scratch / "made").mkdir()
        (scratch / "made" / "last").touch()
        return scratch / "made"

    with lab.hasty():
        assert kept("thing", "last", make).name == "thing-hasty"
    assert list((home / "thing").iterdir()) == []
    assert kept("thing", "last", make).name == "thing"


def test_haste_ends_with_its_block_and_stays_in_its_thread() -> None:
    found = []
    with lab.hasty():
        other = threading.Thread(target=lambda: found.append(haste.is_hasty()))
        other.start()
        other.join()
        with pytest.raises(ValueError, match="gone"), lab.hasty(False):
            raise ValueError("gone")
        assert haste.is_hasty()
    assert found == [False]
    assert not haste.is_hasty()


@pytest.mark.parametrize("name", sorted(lab.PRESETS))
def test_hastened_presets_keep_their_shape_and_worlds(name: str) -> None:
    spec = lab.PRESETS[name]
    short = models.hastened(spec)
    assert type(short) is type(spec)
    assert short.steps == haste.MORE.get(name, haste.STEPS)
    assert short.until is None
    assert len(corpus(short)) <= short.steps * spec.batch + len(spec.corpus)
    assert 0 < len(short.task.task(train=0, heldout=150).heldout) <= haste.PROBLEMS
    same = {"rows": spec.rows, "steps": spec.steps, "until": spec.until, "task": spec.task}
    assert dataclasses.replace(short, **same) == spec


def test_other_kinds_of_models_are_hastened_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mamba, "PROBLEMS", 12)
    monkeypatch.setattr(mamba, "SAMPLES", 1)
    monkeypatch.setattr(vision, "MEASURED", 10)
    snake = MambaSpec("snake", SORT, (Share(SORT),), hidden=16, layers=1, rows=40, steps=3, batch=8)
    picture = VisionSpec(hidden=8, layers=1, heads=2, steps=4, batch=2)
    steps = []
    trained = vision.trained
    monkeypatch.setattr(vision, "trained", lambda spec: (steps.append(spec.steps), trained(spec))[1])
    with lab.hasty():
        assert headroom(snake).steps == 2
        vision_model(picture)
    vision_model(picture)
    assert steps == [2, 4]
    assert {name.rpartition("-")[2] for name in folders(home) if name.startswith("snake-")} == {"hasty"}
    assert len([name for name in folders(home) if name.startswith("patterns-")]) == 2
