"""`posttrain quantize` and `posttrain prune`: what they write and tell, and every mistake in one line."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import call as call_command
from commands import make_folder, write_rows
from filelock import FileLock

from conftest import make_tokenizer
from posttrain import load
from posttrain import quantize as quantize_in_python
from posttrain.compress import policy as policy_module
from posttrain.compress.policy import CompressedPolicy
from tiny_models import make_policy

TEXT = "".join(chr(97 + (i * i) % 26) for i in range(1500))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_folder(tmp_path_factory.mktemp("saved") / "tiny"))


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    monkeypatch.chdir(tmp_path)


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    found = call_command(capsys, *arguments)
    return found.code, found.out, found.err


def quantize(capsys: pytest.CaptureFixture[str], model: str, *arguments: str) -> tuple[int, str, str]:
    return call(capsys, "quantize", model, "--calibration", "text.txt", "--length", "64", "--group", "16", *arguments)


def told(out: str) -> dict[str, str]:
    return dict(re.split(r"  +", line, maxsplit=1) for line in out.splitlines())


def test_a_groups_default_that_does_not_divide_gives_way_and_says_so(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = str(make_folder(tmp_path / "wide", hidden_size=192, intermediate_size=256))
    given = ("quantize", model, "--calibration", "text.txt", "--length", "64", "--samples", "5")
    code, out, err = call(capsys, *given, "--bits", "3", "--output", "small")
    assert code == 0, err
    assert "gptq: its groups of 128 do not divide all layers; taking 64 (--group)" in err
    assert told(out)["bits"].startswith("3.297 a weight")  # (16 + 3) / 64 of scale and zero point
    code, _, err = call(capsys, *given, "--group", "128", "--output", "strict")
    assert code != 0
    assert "group 128 does not divide the 192 input columns" in err

    arguments = ("compare", "--methods", "rtn,gptq", "--model", model, "--calibration", "text.txt")
    code, out, err = call(capsys, *arguments, "--windows", "3", "--length", "64", "--seeds", "2", "--folder", "both")
    assert code == 0, err
    assert "rtn: its groups of 128 do not divide" in err
    with pytest.warns(UserWarning, match="rtn: its groups of 128 do not divide all layers; taking 64"):
        small = quantize_in_python(load(model), "rtn", "text.txt", samples=2, length=64)
    assert small.compression.arguments["group"] == 64


def test_what_it_writes_and_tells(capsys: pytest.CaptureFixture[str], saved: str, tmp_path: Path) -> None:
    code, out, err = quantize(
        capsys, saved, "--bits", "3", "--samples", "5", "--output", "small", "--skip", "*.up_proj"
    )
    assert code == 0, err
    rows = told(out)
    assert list(rows) == [
        "calibrated on", "measured on", "perplexity", "divergence", "bits", "size", "seconds", "folder",
    ]  # fmt: skip
    assert rows["calibrated on"] == "320 tokens of text.txt but for the last tenth"
    assert rows["measured on"] == "126 tokens of the last tenth of text.txt"
    assert re.fullmatch(r"[\d.]+ -> [\d.]+", rows["perplexity"])
    assert rows["bits"].startswith("4.188 a weight in 12 packed layers, relative error 0.")
    assert rows["folder"] == "small"
    assert "gptq: blocks 2/2" in err
    small = load(tmp_path / "small")
    assert isinstance(small, CompressedPolicy)
    config = json.loads((tmp_path / "small" / "config.json").read_text())
    assert config["quantization_config"]["about"]["method"] == "gptq"


def test_the_folder_is_a_model_for_the_other_commands(
    capsys: pytest.CaptureFixture[str], saved: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert quantize(capsys, saved, "--method", "rtn", "--bits", "4")[0] == 0
    folder = "runs/tiny-rtn"
    write_rows(tmp_path / "rows.jsonl", *({"prompt": f"p{i}", "answer": "a"} for i in range(6)))
    task = "{file: rows.jsonl, heldout: 3}"
    code, out, err = call(capsys, "evaluate", folder, "--task", task, "--max-tokens", "3")
    assert code == 0, err
    assert "0.0%" in out
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    code, out, err = call(capsys, "chat", folder, "--max-tokens", "4", "--temperature", "0")
    assert code == 0, err
    assert out
    code, out, err = call(capsys, "train", folder, "sft", "--task", task, "--steps", "1", "--output", "run")
    assert code == 1
    assert "is compressed (rtn, 5.25 bits a weight) and cannot be trained" in err.splitlines()[-1]
    code, out, err = quantize(capsys, folder, "--output", "twice")
    assert code == 1
    assert err == "posttrain: error: runs/tiny-rtn is compressed already (rtn); compress the float model instead\n"
    assert not (tmp_path / "twice").exists()


def test_the_same_seed_gives_the_same_file(capsys: pytest.CaptureFixture[str], saved: str, tmp_path: Path) -> None:
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert quantize(capsys, saved, "--bits", "2", "--samples", "4", "--seed", seed, "--output", name)[0] == 0
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_by_default_the_text_is_the_labs(capsys: pytest.CaptureFixture[str], saved: str) -> None:
    arguments = ["--method", "gptq", "--group", "16", "--samples", "2", "--length", "32", "--set", "damping=0.1"]
    code, out, err = call(capsys, "quantize", saved, *arguments)
    assert code == 0, err
    assert told(out)["calibrated on"] == (
        "64 tokens of problems of the lab with their solutions but for the last tenth (--calibration FILE for text of "
        "your own)"
    )
    code, out, err = call(
        capsys, "quantize", saved, "--method", "rtn", "--group", "16", "--text", "text.txt", "--output", "r"
    )
    assert told(out)["calibrated on"] == "no data"
    assert told(out)["measured on"].endswith("tokens of text.txt")


def test_a_task_to_calibrate_on(capsys: pytest.CaptureFixture[str], saved: str, tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", *({"prompt": f"question {i}", "answer": "a"} for i in range(30)))
    task = "{file: rows.jsonl, heldout: 3}"
    arguments = ["--calibration", task, "--group", "16", "--length", "20", "--output", "small"]
    code, out, err = call(capsys, "quantize", saved, *arguments)
    assert code == 0, err
    assert told(out)["measured on"] == "57 tokens of the last tenth of task rows"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "gtpq"], "unknown method 'gtpq'; did you mean gptq"),
        (["--method", "grpo"], "--method grpo: grpo trains; use posttrain train MODEL grpo"),
        (["--bits", "9"], "--bits 9: bits is 9; a uniform grid has 1 to 8"),
        (["--bits", "0"], "--bits 0: bits is 0; a uniform grid has 1 to 8"),
        (["--samples", "0"], "--samples 0: expected at least 1"),
        (["--seed", "9" * 23], f"--seed is {'9' * 23}; expected a whole number from 0 to 4294967295"),
        (["--seed", "-1"], "--seed is -1; expected a whole number from 0 to 4294967295"),
        (["--set", "damping=-1"], "--set damping=-1: damping is -1; expected a number from 0 on"),
        (["--calibration", ""], "--calibration '': the name of the text is empty; expected a file of text or of rows"),
        (["--calibration", "."], "--calibration .: . is a folder and no data set; expected a file of text or of rows"),
        (["--set", "damping"], "--set damping: expected KEY=VALUE"),
        (["--set", "dampign=1"], "unknown argument of gptq 'dampign'; did you mean damping"),
        (["--set", "bits=4", "--bits", "3"], "--set bits=4: bits is given twice (--bits 3)"),
        (["--set", "zero=flaot"], "--set zero=flaot: zero is 'flaot'; "),
        (["--calibration", "nosuch.txt"], "--calibration nosuch.txt: no file nosuch.txt; expected a file of text"),
        (["--calibration", "{fiel: x}"], "--calibration {fiel: x}: task: got only fiel"),
        (["--text", "nosuch.jsonl"], "--text nosuch.jsonl: no file nosuch.jsonl"),
        (["--output", "."], "--output .: it exists already; choose another folder"),
        ([], "no model at nosuch/: no such folder"),
    ],
)
def test_mistakes_are_told_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str
) -> None:
    code, out, err = call(capsys, "quantize", "nosuch/", *arguments)
    assert (code, out) == (1, "")
    assert err.startswith(f"posttrain: error: {message}")
    assert len(err.splitlines()) == 1
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--group", "24"], "group 24 does not divide the 32 input columns"),
        (["--group", "16", "--skip", "*.mpl.*"], "skip pattern '*.mpl.*' matches no linear layer"),
        (["--group", "16", "--skip", "*"], "every linear layer is skipped"),
        (
            ["--group", "16", "--calibration", "short.txt"],
            "the text has 6 tokens, of which the last tenth is kept back",
        ),
        (["--group", "16", "--calibration", "empty.txt"], "there is no text in empty.txt"),
    ],
)
def test_what_does_not_fit_the_model(
    capsys: pytest.CaptureFixture[str], saved: str, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "short.txt").write_text("little")
    (tmp_path / "empty.txt").write_text("\n")
    code, out, err = call(capsys, "quantize", saved, "--output", "small", *arguments)
    assert (code, out) == (1, "")
    assert message in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "small").exists()


def test_a_place_that_cannot_be_written_is_told_before_a_model_is_loaded(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, err = call(capsys, "quantize", "nosuch/", "--output", "text.txt/small")
    assert (code, out) == (1, "")
    assert err.startswith("posttrain: error: cannot write the compressed model to text.txt/small: ")
    assert "text.txt is no folder" in err
    with FileLock(str(tmp_path / ".small.lock")):
        code, out, err = call(capsys, "quantize", "nosuch/", "--output", "small")
    assert (code, out) == (1, "")
    assert err.startswith("posttrain: error: small is being written by another process; ")
    code, out, err = call(capsys, "quantize", "nosuch/", "--output", "a/b/small")
    assert "no model at nosuch/" in err
    assert not (tmp_path / "a").exists()


def test_what_could_not_be_written_in_the_end_is_kept_and_told(
    capsys: pytest.CaptureFixture[str], saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = policy_module.compressed_copy

    def meanwhile(*given: Any, **options: Any) -> CompressedPolicy:
        (tmp_path / "small").mkdir()
        (tmp_path / "small" / "another's").touch()
        return real(*given, **options)

    monkeypatch.setattr(policy_module, "compressed_copy", meanwhile)
    code, out, err = quantize(capsys, saved, "--method", "rtn", "--output", "small")
    assert code == 1
    assert err.splitlines()[-1] == (
        "posttrain: error: small exists already; choose another folder for the compressed model. The compressed model "
        "is kept in runs/small instead"
    )
    assert told(out)["folder"] == "runs/small"
    assert isinstance(load("runs/small"), CompressedPolicy)
    assert [file.name for file in (tmp_path / "small").iterdir()] == ["another's"]


def test_experts_that_no_token_reached_are_told_in_a_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    make_policy("mixtral", tokenizer, vocab_size=len(tokenizer)).save(tmp_path / "mixture")
    (tmp_path / "short.txt").write_text("a")
    arguments = ("--calibration", "short.txt", "--text", "text.txt", "--group", "16", "--output", "small")
    code, _, err = call(capsys, "quantize", "mixture", *arguments)
    assert code == 0, err
    (line,) = [line for line in err.splitlines() if "warning" in line]
    assert line.startswith("posttrain: warning: no calibration token reached ")
    assert "of 8 experts (model.layers.0.mlp.experts." in line


def test_prune_is_for_methods_that_prune(capsys: pytest.CaptureFixture[str], saved: str) -> None:
    code, _, err = call(capsys, "prune", saved, "--method", "gptq")
    assert code == 1
    assert err == ("posttrain: error: --method gptq: gptq is a method of quantization; use posttrain quantize\n")
    assert call(capsys, "prune", saved)[0] == 2, "a method must be named"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sparsity", "0"], "--sparsity 0.0: sparsity is 0.0; expected a share of the weights above 0 and below 1"),
        (["--sparsity", "1"], "--sparsity 1.0: sparsity is 1.0; expected a share of the weights above 0 and below 1"),
        (["--set", "pattern=4:2"], "--set pattern=4:2: pattern is '4:2'; expected N:M, which keeps N of every M"),
        (["--set", "pattern=0:4"], "--set pattern=0:4: pattern is '0:4'; expected N:M, which keeps N of every M"),
        (["--seed", "9" * 23], f"--seed is {'9' * 23}; expected a whole number from 0 to 4294967295"),
    ],
)
def test_mistakes_in_pruning(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, out, err = call(capsys, "prune", "nosuch/", "--method", "wanda", *arguments)
    assert (code, out) == (1, "")
    assert err.startswith(f"posttrain: error: {message}")
    assert len(err.splitlines()) == 1


def test_a_lab_model_is_calibrated_on_its_own_worlds(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain import lab
    from posttrain.lab import models
    from posttrain.lab.models import ModelSpec, Share, World

    world = World("rewriting", {"operation": "sort", "length": (3, 4)})
    tiny = ModelSpec("tiny", world, (Share(world),), hidden=16, layers=1, heads=2, rows=40, steps=2, batch=8)
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path))
    monkeypatch.setattr(models, "PROBLEMS", 6)
    monkeypatch.setitem(lab.PRESETS, "tiny", tiny)
    code, out, err = call(capsys, "quantize", "lab:tiny", "--group", "16", "--samples", "9", "--output", "small")
    assert code == 0, err
    assert "text of the worlds of tiny" in told(out)["calibrated on"]
    assert told(out)["measured on"].endswith("tokens of the same from beyond the held-out border")
    assert load("small").dtype in (torch.float32, torch.bfloat16)
