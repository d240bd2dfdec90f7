"""Calibration text: where it comes from, how windows are drawn, and what is kept back."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch

from conftest import make_model, make_tokenizer
from posttrain import tasks
from posttrain.compress.calibrate import (
    calibration_batches,
    kept_back,
    streams,
    text_of,
    token_stream,
    whole_sequences,
    window_batches,
    windows,
)
from posttrain.compress.method import Calibrated
from posttrain.evaluation.task import Task
from posttrain.models.causal import CausalPolicy
from posttrain.trajectory import Group, PosttrainError, Trajectory

ROWS = [{"prompt": f"question {i}?", "answer": f"{i}"} for i in range(20)]


@pytest.fixture(scope="module")
def policy() -> CausalPolicy:
    return CausalPolicy(make_model(), make_tokenizer(), "tiny")


def text(policy: CausalPolicy, tokens: torch.Tensor) -> str:
    return str(policy.tokenizer.decode(tokens))


def test_a_text_file_is_one_stream(tmp_path: Path, policy: CausalPolicy) -> None:
    (tmp_path / "notes").write_text("some words\nand more")
    assert text(policy, token_stream(policy, tmp_path / "notes")) == "some words\nand more"


def test_rows_and_texts_are_joined_by_an_empty_line(tmp_path: Path, policy: CausalPolicy) -> None:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:2]))
    expected = "question 0?\n0\n\nquestion 1?\n1"
    assert text(policy, token_stream(policy, str(tmp_path / "rows.jsonl"))) == expected
    assert text(policy, token_stream(policy, ["a", "", "b"])) == "a\n\nb"


def test_a_task_gives_its_training_problems_with_solutions(policy: CausalPolicy) -> None:
    task = tasks.from_rows([{**row, "solution": "think"} for row in ROWS], heldout=5)
    found = text(policy, token_stream(policy, task))
    assert found.startswith(f"{task.train[0].question}\nthink\n\n")
    assert not any(item.question in found for item in task.heldout)


def test_what_a_user_may_give(tmp_path: Path) -> None:
    (tmp_path / "chain_sum").write_text("a file of the name of a task")
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert text_of(str(tmp_path / "chain_sum")) == str(tmp_path / "chain_sum")
    assert text_of("owner/name") == "owner/name"
    assert isinstance(text_of("chain_sum"), Task)
    assert isinstance(text_of({"file": str(file)}), Task)
    assert text_of(["a", "b"]) == ["a", "b"]
    assert text_of(text for text in "ab") == ["a", "b"]  # type: ignore[arg-type]
    saved = tmp_path / "saved"
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(str(saved))
    assert text_of(saved) == saved


def test_windows_follow_the_seed() -> None:
    tokens = torch.arange(1000)
    one, again, other = (windows(tokens, 5, 20, seed) for seed in (0, 0, 1))
    assert [w.tolist() for w in one] == [w.tolist() for w in again] != [w.tolist() for w in other]
    assert all(w.tolist() == list(range(int(w[0]), int(w[0]) + 20)) for w in one)
    assert windows(tokens[:7], 5, 20)[0].tolist() == list(range(7))
    assert len(windows(tokens[:7], 5, 20)) == 1
    assert max(int(w[-1]) for w in windows(torch.arange(30), 200, 20)) == 29, "the last place can be drawn"


def test_batches_hold_all_windows_and_respect_the_context(policy: CausalPolicy) -> None:
    tokens = torch.arange(5000) % 259
    found = window_batches(policy, tokens, 20, 1000)
    assert {tuple(batch["input_ids"].shape) for batch in found} == {(16, 256), (4, 256)}
    assert all(batch["use_cache"] is False for batch in found)
    again = calibration_batches(policy, [policy.tokenizer.decode(list(range(3, 90)))], 3, 10, seed=2)
    assert again[0]["input_ids"].shape == (3, 10)


def test_sequences_of_one_length_stand_together() -> None:
    def group(length: int) -> Group:
        return Group([Trajectory(torch.arange(length), torch.ones(length, dtype=torch.bool))])

    found = whole_sequences([group(3), group(5), group(3)])
    assert [tuple(batch["input_ids"].shape) for batch in found] == [(2, 3), (1, 5)]


def test_the_last_tenth_is_kept_back(policy: CausalPolicy) -> None:
    calibration, rest = kept_back(torch.arange(200))
    assert (len(calibration), rest.tolist()) == (180, list(range(180, 200)))
    source = ["0123456789" * 30]
    found = streams(policy, source)
    assert len(found.calibration) == 270
    assert sum(t.length for group in found.unseen(policy, 10) for t in group.trajectories) == 30
    assert found.measured_on == "the last tenth of the texts given"
    calibrated = torch.cat([b["input_ids"].flatten() for b in found.batches(policy, Calibrated(50, 20), 0)])
    assert len(calibrated) == 1000
    other = streams(policy, source, ["another text"], "digits")
    assert (len(other.calibration), other.calibrated_on, other.measured_on) == (300, "digits", "the texts given")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f, p: token_stream(p, f / "no.txt"), r"cannot read .*no\.txt: No such file or directory"),
        (lambda f, p: token_stream(p, f / "no.jsonl"), r"no file .*no\.jsonl"),
        (lambda f, p: token_stream(p, f / "empty.txt"), r"there is no text in .*empty\.txt"),
        (
            lambda f, p: token_stream(p, f / "bytes.txt"),
            r"bytes\.txt is no text in UTF-8 \(invalid start byte at byte 2",
        ),
        (lambda f, p: token_stream(p, f / "broken.jsonl"), "broken JSON"),
        (lambda f, p: text_of("chain_smu"), "no file chain_smu, and no task of that name: .*chain_sum"),
        (lambda f, p: text_of(" "), "^the name of the text is empty; expected a file of text or of rows, a hub id"),
        (lambda f, p: text_of(42), r"^the calibration text is a number \(42\); expected a file of text or of rows"),
        (lambda f, p: text_of([{"a": "b"}]), "^the calibration text is an object; expected a file of text or of rows"),
        (lambda f, p: text_of(f), r"is a folder and no data set; expected .*, or a task, such as .*broken\.jsonl$"),
        (lambda f, p: text_of(f / "empty"), r"empty is a folder and no data set; expected .*, or a task$"),
        (lambda f, p: text_of({"fiel": "x"}), "task: got only fiel; expected one of"),
        (lambda f, p: kept_back(torch.arange(9)), "the text has 9 tokens, of which the last tenth is kept back"),
        (lambda f, p: windows(torch.arange(0), 2, 2), "calibration is empty"),
        (lambda f, p: windows(torch.arange(9), 0, 2), "calibration is 0 windows of 2 tokens"),
    ],
)
def test_mistakes(tmp_path: Path, policy: CausalPolicy, call, message: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "bytes.txt").write_bytes(b"ab\xff\xfe")
    (tmp_path / "broken.jsonl").write_text('{"prompt": \n')
    with pytest.raises(PosttrainError, match=message):
        call(tmp_path, policy)
