"""`posttrain methods`, `posttrain models` and `posttrain report`."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from commands import call

from posttrain import methods
from posttrain.models import load


def test_list_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "methods", "list", "--json")
    rows = json.loads(done.out)
    assert done.code == 0
    assert [row["name"] for row in rows] == list(methods.registered())
    assert all(list(row) == ["name", "family", "card", "kind", "parts", "summary"] for row in rows)
    by_name = {row["name"]: row for row in rows}
    assert (by_name["grpo"]["kind"], by_name["sft"]["kind"]) == ("online", "offline")
    assert by_name["grpo"]["card"] == "046"
    assert by_name["dpo"]["card"] is None
    assert by_name["dpo"]["summary"] == "Direct preference optimisation."
    assert by_name["grpo"]["parts"]["advantage"].startswith("GroupNormalised(")


def test_list_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "methods", "list", "--family", "preference")
    lines = done.out.splitlines()
    expected = [name for name, entry in methods.registered().items() if entry.family == "preference"]
    assert lines[0].split() == ["name", "family", "card", "summary"]
    assert [line.split()[0] for line in lines[1:]] == expected
    assert any(line.rstrip().endswith("Direct preference optimisation.") for line in lines)


def test_unknown_family(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "methods", "list", "--family", "prefrence")
    assert (done.code, done.out) == (1, "")
    assert done.error.startswith("error: unknown family 'prefrence'; did you mean preference?")


@pytest.mark.parametrize("name", ["grpo", "GRPO"])
def test_show(capsys: pytest.CaptureFixture[str], name: str) -> None:
    done = call(capsys, "methods", "show", name)
    lines = done.out.splitlines()
    assert done.code == 0
    assert lines[0] == "grpo(clip: float = 0.2, beta: float = 0.0)"
    assert lines[2].startswith("Group relative policy optimisation")
    assert "  denominator  OldPolicy()" in lines
    assert "  steps             100  (its own)" in lines
    assert "  warmup            0.05" in lines
    assert lines[-3:] == ["family: policy-gradient", "card: 046", "learns from: prompts"]


@pytest.mark.parametrize("name", methods.registered())
def test_show_every_method(capsys: pytest.CaptureFixture[str], name: str) -> None:
    done = call(capsys, "methods", "show", name)
    assert done.code == 0
    assert done.out.startswith(f"{name}(")


def test_show_an_unknown_method(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "methods", "show", "gprpo")
    assert (done.code, done.error) == (1, "error: unknown method 'gprpo'; did you mean grpo?")


def test_models(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POSTTRAIN_HOME", str(tmp_path))
    before = call(capsys, "models")
    assert before.code == 0
    assert before.out.startswith("smollm2-135m: SmolLM2-135M-Instruct")
    assert "not fetched yet: posttrain models pull smollm2-135m" in before.out
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / "config.json").write_text("{}")
    assert f"cached in {tmp_path / 'smollm2-135m'}" in call(capsys, "models").out


def test_pull(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "bundled_folder", lambda name: tmp_path / name)
    done = call(capsys, "models", "pull", "smollm2-135m")
    assert (done.code, done.out) == (0, f"{tmp_path / 'smollm2-135m'}\n")


def test_pull_an_unknown_model(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "models", "pull", "smollm")
    assert done.code == 1
    assert done.error.startswith("error: unknown bundled model 'smollm'; did you mean smollm2-135m?")


RUN = {"name": "one", "status": "interrupted", "stages": [{"index": 0, "name": "sft"}], "notes": []}


def test_report_is_built_again(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    (tmp_path / "run.json").write_text(json.dumps(RUN))
    done = call(capsys, "report", tmp_path)
    page = tmp_path / "report.html"
    assert (done.code, done.out) == (0, f"{page}\n")
    assert "interrupted" in page.read_text()
    assert not opened
    assert call(capsys, "report", tmp_path, "--open").code == 0
    assert opened == [page.resolve().as_uri()]


def test_report_of_no_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    done = call(capsys, "report", tmp_path)
    assert done.code == 1
    assert done.error.startswith(f"error: {tmp_path} is not a run folder: no run.json in it")
    assert not list(tmp_path.iterdir())
    shutil.rmtree(tmp_path)
    assert call(capsys, "report", tmp_path).code == 1
