"""`posttrain export`: what it writes and tells, and every mistake in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from commands import call as call_command

from conftest import make_model, make_tokenizer
from posttrain import load, methods, quantize
from posttrain.models.causal import CausalPolicy

MERGES = [("t", "h"), ("th", "e")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a float model in `float` and a quantized one in `small`."""
    folder = tmp_path_factory.mktemp("saved")
    policy = CausalPolicy(
        make_model(vocab_size=261, hidden_size=64, intermediate_size=128), make_tokenizer(MERGES), "tiny"
    )
    policy.save(folder / "float")
    quantize(policy, methods.rtn(bits=4, group=32, zero="none"), ["text of some length"], show=False).save(
        folder / "small"
    )
    return folder


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    found = call_command(capsys, "export", *arguments)
    return found.code, found.out, found.err


def told(out: str) -> dict[str, str]:
    return {line[:8].strip(): line[10:] for line in out.splitlines()}


def test_compressed_tensors(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path) -> None:
    code, out, err = call(capsys, saved / "small", "--format", "compressed-tensors")
    assert code == 0, err
    folder = Path("runs/small-compressed-tensors")
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert told(out) == {
        "format": "compressed-tensors",
        "matrices": "14 as W4 group 32",
        "size": f"{size / 1e6:.3f} MB" if size < 1e5 else f"{size / 1e6:,.1f} MB",
        "written": str(folder),
    }
    assert "compressed-tensors: tensors 14/14" in err
    config = json.loads((tmp_path / folder / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"


def test_gguf(capsys: pytest.CaptureFixture[str], saved: Path) -> None:
    code, out, err = call(capsys, saved / "small", "--format", "gguf", "--dtype", "q8_0")
    assert code == 0, err
    assert told(out)["matrices"] == "14 as Q4_0, 1 as Q8_0"
    assert told(out)["written"] == "runs/small.gguf"
    assert load("runs/small.gguf").model.config.model_type == "llama"
    code, out, err = call(capsys, saved / "float", "--format", "gguf", "--dtype", "f16", "--output", "model.gguf")
    assert code == 0, err
    assert told(out)["matrices"] == "15 as F16"
    code, out, err = call(capsys, "model.gguf", "--format", "gguf", "--output", "again.gguf")
    assert code == 0, "a GGUF file is a model as any other"
    assert told(out)["matrices"] == "15 as F16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no/", "--format", "ggfu"], "unknown format 'ggfu'; did you mean gguf"),
        (["no/", "--format", "gguf", "--dtype", "q4"], "dtype 'q4' is no type of gguf; expected f32, f16, bf16, q8_0"),
        (["no/", "--format", "gguf", "--output", "."], ". exists already; choose another file"),
        (["no/", "--format", "gguf"], "no model at no/: no such folder"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str) -> None:
    code, out, err = call(capsys, *arguments)
    assert (code, out) == (1, "")
    assert err.startswith(f"posttrain: error: {message}")
    assert len(err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_what_does_not_fit(capsys: pytest.CaptureFixture[str], saved: Path, tmp_path: Path) -> None:
    code, out, err = call(capsys, saved / "float", "--format", "compressed-tensors")
    assert (code, out) == (1, "")
    assert "is not quantized" in err
    assert len(err.splitlines()) == 1
    assert call(capsys, saved / "float")[0] == 2, "a format must be named"
    assert not list(tmp_path.iterdir())
