"""Runs with a stage that compresses: what they leave, and how they stop, fail and go on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import run_recipes
from conftest import make_model, make_tokenizer
from posttrain import run_compress
from posttrain.compress.packed.linear import PackedLinear
from posttrain.models.causal import CausalPolicy
from posttrain.models.load import load
from posttrain.run import Interrupted, resume_run
from posttrain.run_compress import size
from posttrain.trajectory import PosttrainError
from run_recipes import TASK, go, state

SFT = {"sft": {"steps": 1, "batch": 2, "learning_rate": 1e-2}}
GPTQ = {"gptq": {"bits": 4, "group": 32, "samples": 4, "length": 16}}


def recipe(model: str, *stages: Any, task: Any = TASK) -> Any:
    """With the task unless said otherwise: it is the text to calibrate on."""
    return run_recipes.recipe(model, *stages, task=task)


def logits(policy: CausalPolicy) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = policy.model(input_ids=torch.arange(12)[None]).logits
    return found


def test_trained_then_compressed(saved: str, tmp_path: Path) -> None:
    run = go(recipe(saved, SFT, GPTQ), tmp_path / "run")
    assert run.after is not None
    kept = state(tmp_path / "run")
    first, second = kept["stages"]
    assert (second["kind"], second["steps"], second["compression"]["layers"]) == ("compression", None, 14)
    assert second["compression"]["bits"] == pytest.approx(4 + 20 / 32)
    assert second["compression"]["bytes_after"] < second["compression"]["bytes_before"]
    assert second["compression"]["tokens"] == 4 * 16
    assert "compression" not in first
    (note,) = [
        note for note in kept["notes"] if note.startswith("gptq: 14 layers of 4.62 bits a weight, calibrated on 64")
    ]
    assert " kB instead of " in note
    found = load(tmp_path / "run" / "model", precision="fp32")
    assert len([m for m in found.model.modules() if isinstance(m, PackedLinear)]) == 14
    assert torch.equal(logits(found), logits(run.model))
    labels = [json.loads(line)["label"] for line in (tmp_path / "run" / "evaluations.jsonl").read_text().splitlines()]
    assert labels == ["before", "after sft", "after gptq", "comparison"]
    page = run.report.read_text()
    assert "4.62 bits a weight" in page
    assert '<th scope="col">size</th>' in page


def test_a_usual_group_that_does_not_divide_gives_way_and_says_so(tmp_path: Path) -> None:
    make_model(hidden_size=192, intermediate_size=256).save_pretrained(tmp_path / "wide")
    make_tokenizer().save_pretrained(tmp_path / "wide")
    go(recipe(str(tmp_path / "wide"), {"rtn": {"bits": 4}}), tmp_path / "run")
    kept = state(tmp_path / "run")
    assert kept["stages"][0]["compression"]["bits"] == pytest.approx(4 + 20 / 64)
    (note,) = [note for note in kept["notes"] if note.startswith("rtn: ")]
    assert note.startswith(
        "rtn: its groups of 128 do not divide all layers; taking 64; 14 layers of 4.31 bits a weight"
    )
    with pytest.raises(PosttrainError, match="group 128 does not divide the 192 input columns"):
        go(recipe(str(tmp_path / "wide"), {"rtn": {"bits": 4, "group": 128}}), tmp_path / "strict")


def test_without_a_task_or_text_it_is_rounded(saved: str, tmp_path: Path) -> None:
    run = go(recipe(saved, {"rtn": {"bits": 8, "group": 0, "skip": "*.down_proj"}}, task=None), tmp_path / "run")
    (stage,) = state(tmp_path / "run")["stages"]
    assert (stage["compression"]["layers"], stage["compression"]["tokens"]) == (12, 0)
    assert "compressed in " in run.report.read_text() or "compressed by rtn" in run.report.read_text()
    assert isinstance(run.model.base.model.layers[0].mlp.down_proj, torch.nn.Linear)


@pytest.mark.parametrize("text", ["file", "rows", "list"])
def test_text_of_ones_own(saved: str, tmp_path: Path, text: str) -> None:
    (tmp_path / "notes.txt").write_text("Some words. " * 50)
    (tmp_path / "rows.jsonl").write_text('{"text": "Some words of a row."}\n' * 20)
    source = {"file": str(tmp_path / "notes.txt"), "rows": str(tmp_path / "rows.jsonl"), "list": ["Some words. " * 30]}
    stage = {"gptq": {**GPTQ["gptq"], "calibration": source[text]}}
    go(recipe(saved, stage, task=None), tmp_path / "run")
    assert state(tmp_path / "run")["stages"][0]["compression"]["tokens"] == 64


def test_the_task_is_the_text_by_default(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    batches = run_compress.calibration_batches

    def watched(policy: Any, source: Any, *rest: Any) -> Any:
        seen.append(source)
        return batches(policy, source, *rest)

    monkeypatch.setattr(run_compress, "calibration_batches", watched)
    go(recipe(saved, GPTQ), tmp_path / "run")
    assert len(seen[0].train) == 16


# -- mistakes that only the model shows ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"group": 48}, r"group 48 does not divide the 64 input columns of model\.layers\.0\.mlp\.down_proj"),
        ({"group": 0, "skip": "*.dwn_proj"}, r"skip pattern '\*\.dwn_proj' matches no linear layer"),
    ],
)
def test_told_before_the_stages_ahead_are_trained(saved: str, tmp_path: Path, body: Any, message: str) -> None:
    with pytest.raises(PosttrainError, match=message):
        go(recipe(saved, SFT, {"rtn": body}), tmp_path / "run")
    assert not (tmp_path / "run").exists(), "nothing was done yet, so that the mended recipe can take its name"


def test_a_task_without_training_problems(saved: str, tmp_path: Path) -> None:
    task = {"multiple_choice": [{"question": "q", "choices": ["a", "b"], "answer": 0}]}
    with pytest.raises(PosttrainError, match=r"gptq: task .* has no training problems to be calibrated on; give"):
        go(recipe(saved, GPTQ, task=task), tmp_path / "run")


# -- stopping and going on -------------------------------------------------------------------------------------------


def test_killed_midway_the_stage_starts_again(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = go(recipe(saved, SFT, GPTQ), tmp_path / "whole")

    def killed(*_: Any, **__: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("posttrain.run_compress.compressed_copy", killed)
        with pytest.raises(Interrupted, match="go on with: posttrain run --resume"):
            go(recipe(saved, SFT, GPTQ), tmp_path / "run")
    assert state(tmp_path / "run")["status"] == "interrupted"
    assert (tmp_path / "run" / "stages" / "0-sft" / "model").is_dir()
    assert not (tmp_path / "run" / "model").exists()
    again = resume_run(tmp_path / "run", show=False)
    assert torch.equal(logits(again.model), logits(whole.model))
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("run", "whole")]
    assert weights[0] == weights[1]


def test_stopped_between_blocks(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import posttrain.run

    monkeypatch.setattr(posttrain.run._Stop, "__call__", lambda self: self.until == "this block")
    with pytest.raises(Interrupted, match="stopped at block 1 of 2 of gptq, which starts again; go on with: "):
        go(recipe(saved, GPTQ), tmp_path / "run")
    monkeypatch.undo()
    assert resume_run(tmp_path / "run", show=False).after is not None


def test_a_finished_run_is_read_again(saved: str, tmp_path: Path) -> None:
    first = go(recipe(saved, GPTQ), tmp_path / "run")
    again = resume_run(tmp_path / "run", show=False)
    assert torch.equal(logits(again.model), logits(first.model))
    assert again.after is not None
    assert first.after is not None
    assert again.after.accuracy == first.after.accuracy


def test_a_policy_of_the_callers_stays_as_it_was(saved: str, tmp_path: Path) -> None:
    policy = load(saved, precision="fp32")
    before = logits(policy)
    run = go(recipe(saved, GPTQ), tmp_path / "run", policy=policy)
    assert torch.equal(logits(policy), before)
    assert not torch.equal(logits(run.model), before)


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 B"), (84_100_000, "84.1 MB"), (1_540, "1.5 kB"), (3 * 10**9, "3.00 GB")]
)
def test_sizes_in_words(count: int, text: str) -> None:
    assert size(count) == text
