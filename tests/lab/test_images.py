"""The lab's images and the vision transformers trained on them: made by seed, with a border that holds."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.lab import images as world
from posttrain.lab import vision
from posttrain.lab.images import BORDER, DIM, KINDS, SIDE, images
from posttrain.lab.vision import ACCURACY, VisionSpec, accuracy, logits, vision_model

TINY = VisionSpec("tiny", hidden=16, layers=1, heads=2, steps=2, batch=4)


def test_images_follow_the_seed() -> None:
    one, again, other = images(50, 3), images(50, 3), images(50, 4)
    assert torch.equal(one.pixels, again.pixels)
    assert torch.equal(one.labels, again.labels)
    assert not torch.equal(one.pixels, other.pixels)
    assert one.pixels.shape == (50, 1, SIDE, SIDE)
    assert not torch.equal(images(50, 3, "heldout").pixels, one.pixels)


def test_all_patterns_are_as_frequent_and_one_in_five_descriptions_is_held_out() -> None:
    labels = images(4000).labels
    assert labels.bincount(minlength=len(KINDS)).min() > 0.8 * 4000 / len(KINDS)
    drawn = world._descriptions(5000, torch.Generator().manual_seed(0))
    share = float((world._hash(drawn) % BORDER == 0).float().mean())
    assert share == pytest.approx(1 / BORDER, abs=0.03)


def test_nothing_held_out_is_ever_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[torch.Tensor]] = {"train": [], "heldout": []}
    for split in ("train", "heldout"):
        squares = world._squares

        def noted(kind: Any, quarter: Any, shape: Any, split: str = split, squares: Any = squares) -> torch.Tensor:
            seen[split].append(torch.cat([kind[:, None], quarter[:, None], shape], 1))
            return squares(kind, quarter, shape)

        monkeypatch.setattr(world, "_squares", noted)
        for seed in range(5):
            images(400, seed, split)  # type: ignore[arg-type]
        monkeypatch.undo()
    shown = {}
    for split, parts in seen.items():
        both = [torch.cat(pair, 1) for pair in zip(parts[::2], parts[1::2], strict=True)]
        shown[split] = {tuple(row) for rows in both for row in rows.tolist()}
    assert len(shown["heldout"]) > 1500
    assert not shown["train"] & shown["heldout"]


def test_what_an_image_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(world, "NOISE", 0.0)
    given = images(300, 1)
    bright, dim = (given.pixels == 1).sum((1, 2, 3)), ((given.pixels - DIM).abs() < 1e-6).sum((1, 2, 3))
    assert given.pixels.unique().tolist() == pytest.approx([0.0, DIM, 1.0])
    assert bright.min() > 8
    assert dim.min() > 8
    for pixels, label in zip(given.pixels[:, 0], given.labels.tolist(), strict=True):
        rows, columns = torch.nonzero(pixels == 1).T
        square = pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1] == 1
        half = SIDE // 2
        assert rows.min() // half == rows.max() // half, "a square lies in one quarter"
        assert columns.min() // half == columns.max() // half
        if KINDS[label] == "solid":
            assert square.all()
        elif KINDS[label] == "frame":
            assert square[0].all()
            assert square[:, -1].all()
            assert not square[2:-2, 2:-2].any()
        elif KINDS[label] == "rows":
            assert (square == square[:, :1]).all()
        elif KINDS[label] == "columns":
            assert (square == square[:1]).all()
        elif KINDS[label] == "rising":
            assert torch.equal(square[1:, :-1], square[:-1, 1:])
        elif KINDS[label] == "falling":
            assert torch.equal(square[1:, 1:], square[:-1, :-1])


def test_a_model_is_trained_once_and_follows_its_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path))
    monkeypatch.setattr(vision, "MEASURED", 20)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one = vision_model(TINY)
    assert torch.equal(torch.get_rng_state(), state)
    pixels = images(6).pixels
    monkeypatch.setattr(world, "images", lambda *given: pytest.fail("trained again"))
    assert torch.equal(logits(vision_model(TINY), pixels), logits(one, pixels))
    monkeypatch.undo()
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path))
    monkeypatch.setattr(vision, "MEASURED", 20)
    assert not torch.equal(logits(vision_model(TINY, 1), pixels), logits(one, pixels))
    (folder,) = (tmp_path / "lab").glob(f"tiny-0-{TINY.key}")
    told = json.loads((folder / ACCURACY).read_text())["accuracy"]
    assert told == pytest.approx(accuracy(one, 20))
    assert dataclasses.replace(TINY, steps=3).key != TINY.key


def test_training_learns() -> None:
    spec = VisionSpec("tiny", hidden=32, layers=2, heads=2, steps=80, batch=32, learning_rate=4e-3)
    given = images(200, 9, "heldout")

    def loss(model: Any) -> float:
        return float(torch.nn.functional.cross_entropy(logits(model.eval(), given.pixels), given.labels))

    assert loss(vision.trained(spec)) < 0.97 * loss(vision.initial(spec))
