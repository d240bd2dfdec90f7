"""Whole runs: folders that there are already, how runs stop and fail, and how they go on."""

from __future__ import annotations

import errno
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_model, make_tokenizer
from posttrain.models.causal import CausalPolicy
from posttrain.run import Interrupted, Run, execute, resume_run
from posttrain.run_folder import FAILED, RunFolder
from posttrain.training import checkpoint
from posttrain.trajectory import PosttrainError
from run_recipes import FAST, PAIRS, TASK, contents, go, recipe, rows, small, state

# -- folders ---------------------------------------------------------------------------------------------------------


def test_an_existing_folder_is_refused_and_untouched(saved: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(PosttrainError, match="mine exists and is no run; choose an output that does not exist yet"):
        go(small(saved), tmp_path / "mine")
    with pytest.raises(PosttrainError, match="exists and is no run"):
        go(small(saved), tmp_path / "mine", resume=True)
    (tmp_path / "file").write_text("text")
    with pytest.raises(PosttrainError, match="exists and is no run"):
        go(small(saved), tmp_path / "file")
    assert contents(tmp_path) == {"mine/thesis.tex": b"years of work", "file": b"text"}

    go(small(saved), tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(PosttrainError, match=r"run holds a run already; resume it \(posttrain run --resume .*run\)"):
        go(small(saved), tmp_path / "run")
    with pytest.raises(PosttrainError, match="was started with another recipe than the one given"):
        go(small(saved, steps=5), tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == before
    with pytest.raises(PosttrainError, match=r"is not a run folder: no run\.json in it"):
        resume_run(tmp_path / "mine")


def test_an_empty_folder_will_do(saved: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert go(small(saved), tmp_path / "run").folder == tmp_path / "run"


def test_a_finished_run_is_returned_at_once(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = recipe(saved, {"sft": {**FAST, "steps": 3}}, task=TASK)
    first = go(found, tmp_path / "run")
    before = contents(tmp_path / "run")

    def never(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("nothing is to be done")

    monkeypatch.setattr("posttrain.run.Trainer", never)
    monkeypatch.setattr("posttrain.run.evaluate", never)
    again = resume_run(tmp_path / "run", show=False)
    assert again.summary() == first.summary()
    for (name, a), (_, b) in zip(
        first.model.model.named_parameters(), again.model.model.named_parameters(), strict=True
    ):
        assert torch.equal(a, b), name
    after = contents(tmp_path / "run")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} <= {"report.html"}


def test_a_run_goes_on_only_from_the_weights_it_started_from(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model trained in memory, stopped and given again would be its own reference."""
    from posttrain.training.loop import Trainer

    found = recipe(saved, {"dpo": {**FAST, "steps": 4, "batch": 4, "checkpoint_every": 1, "data": {"source": PAIRS}}})
    whole = go(found, tmp_path / "whole", policy=CausalPolicy(make_model(), make_tokenizer(), saved))
    real = Trainer.step

    def step(self: Trainer, collected: Any) -> dict[str, float]:
        if self.progress.step == 2:
            raise ZeroDivisionError
        return real(self, collected)

    policy = CausalPolicy(make_model(), make_tokenizer(), saved)
    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(ZeroDivisionError):
        go(found, tmp_path / "run", policy=policy)
    monkeypatch.setattr(Trainer, "step", real)
    with pytest.raises(PosttrainError, match=r"run did not start from these weights of .*; load the model anew"):
        go(found, tmp_path / "run", policy=policy, resume=True)
    run = resume_run(tmp_path / "run", show=False)  # loads it anew
    assert (run.folder / "model" / "model.safetensors").read_bytes() == (
        whole.folder / "model" / "model.safetensors"
    ).read_bytes()


def test_default_folders_differ(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [execute(small(saved, steps=1), show=False).folder for _ in range(2)]
    assert runs[0] != runs[1]
    assert all(run.parent == Path("runs") and run.name.startswith("sft-") for run in runs)


def test_one_process_at_a_time(saved: str, tmp_path: Path) -> None:
    go(small(saved), tmp_path / "run")
    with (
        RunFolder.read(tmp_path / "run").locked(),
        pytest.raises(PosttrainError, match="run is in use by another process; wait for that run or stop it"),
    ):
        resume_run(tmp_path / "run", show=False)
    resume_run(tmp_path / "run", show=False)


# -- stopping and failing ----------------------------------------------------------------------------------------------


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_after_the_step_and_the_run_goes_on(
    number: int, saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from posttrain.training.loop import Trainer

    whole = go(small(saved, steps=6), tmp_path / "whole")
    real, handler = Trainer.step, signal.getsignal(number)

    def step(self: Trainer, collected: Any) -> dict[str, float]:
        if self.progress.step == 2:
            os.kill(os.getpid(), number)
        return real(self, collected)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(Interrupted, match=r"stopped at step 3 of 6 of sft; .* go on with: posttrain run --resume"):
        execute(small(saved, steps=6), folder=tmp_path / "run")
    assert "stopping after this step, with a checkpoint" in capsys.readouterr().err
    assert signal.getsignal(number) == handler
    assert state(tmp_path / "run")["status"] == "interrupted"
    assert [p.name for p in (tmp_path / "run" / "stages" / "0-sft" / "checkpoints").iterdir()] == ["step-00000003"]
    assert (tmp_path / "run" / "report.html").is_file()
    monkeypatch.setattr(Trainer, "step", real)
    run = resume_run(tmp_path / "run", show=False)
    assert state(tmp_path / "run")["status"] == "finished"
    assert weights(run.folder) == weights(whole.folder)


def test_the_second_signal_interrupts_at_once(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.training.loop import Trainer

    def step(self: Trainer, collected: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(Interrupted, match="stopped; what is finished is kept; go on with: posttrain run --resume"):
        go(small(saved), tmp_path / "run")
    assert state(tmp_path / "run")["status"] == "interrupted"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_is_told_how_the_run_ended_changes_nothing(
    number: int, saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A launcher sends TERM to the processes that are left when one has ended; their message must come out whole."""
    from posttrain.training.loop import Trainer

    def step(self: Trainer, collected: Any) -> dict[str, float]:
        raise PosttrainError("the disk has gone")

    def note(self: RunFolder, text: str) -> None:
        if text.startswith(FAILED):
            os.kill(os.getpid(), number)
        real(self, text)

    real, handler = RunFolder.note, signal.getsignal(number)
    monkeypatch.setattr(Trainer, "step", step)
    monkeypatch.setattr(RunFolder, "note", note)
    with pytest.raises(PosttrainError, match="the disk has gone"):
        go(small(saved), tmp_path / "run")
    assert signal.getsignal(number) == handler


def test_a_run_outside_the_main_thread_leaves_signals_alone(saved: str, tmp_path: Path) -> None:
    done: list[Run] = []
    thread = threading.Thread(target=lambda: done.append(go(small(saved), tmp_path / "run")))
    thread.start()
    thread.join()
    assert state(done[0].folder)["status"] == "finished"


@pytest.mark.parametrize("lora", [0, 4])
def test_a_failed_run_keeps_its_checkpoint_and_goes_on(
    lora: int, saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.training.loop import Trainer

    found = small(saved, steps=6, checkpoint_every=2, lora=lora)
    whole = go(found, tmp_path / "whole")
    real = Trainer.step

    def step(self: Trainer, collected: Any) -> dict[str, float]:
        if self.progress.step == 3:
            raise ZeroDivisionError("a bug in the middle")
        return real(self, collected)

    policy = CausalPolicy(make_model(), make_tokenizer(), saved)
    start = {name: p.clone() for name, p in policy.model.named_parameters()}
    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(ZeroDivisionError):
        go(found, tmp_path / "run", policy=policy)
    failed = state(tmp_path / "run")
    assert (failed["status"], failed["finished"]) == ("failed", None)
    assert failed["notes"][-1] == "failed: a bug in the middle"
    assert checkpoint.latest(tmp_path / "run" / "stages" / "0-sft" / "checkpoints") is not None
    if lora:
        assert not policy.adapted
        left = dict(policy.model.named_parameters())
        assert left.keys() == start.keys()
        assert all(torch.equal(left[name], start[name]) for name in start), "the model given is as it was"

    monkeypatch.setattr(Trainer, "step", real)
    run = resume_run(tmp_path / "run", show=False)
    assert weights(run.folder) == weights(whole.folder)
    finished = state(tmp_path / "run")
    assert finished["status"] == "finished"
    assert not any(note.startswith("failed") for note in finished["notes"])
    assert [m["step"] for m in rows(tmp_path / "run" / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_losses_that_are_not_finite_stop_the_run_with_a_note(
    saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.training import loop

    monkeypatch.setattr(loop, "learning_rate", lambda *_: float("nan"))
    with pytest.raises(PosttrainError, match="2 updates in a row were not finite"):
        go(small(saved, max_skipped=2), tmp_path / "run")
    notes = state(tmp_path / "run")["notes"]
    assert notes[-1].startswith("failed: 2 updates in a row")
    assert sum("the update was skipped" in note for note in notes) == 2


def test_a_full_disk_is_a_line_for_the_user(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.training.track import Tracker

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    found = small(saved, checkpoint_every=2)
    whole = go(found, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(CausalPolicy, "save", full)
        with pytest.raises(PosttrainError, match=r"cannot save the model to .*No space left.*free some space and res"):
            go(found, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
    with monkeypatch.context() as patch:
        patch.setattr(Tracker, "_append", full)
        with pytest.raises(PosttrainError, match=r"cannot write to .*run: .*No space left.*free some space and resume"):
            go(found, tmp_path / "run", resume=True)
    with monkeypatch.context() as patch:
        patch.setattr("posttrain.run_folder.write_text", full)  # not even the status can be written
        patch.setattr(Tracker, "_append", full)
        with pytest.raises(PosttrainError, match="cannot write to"):
            go(found, tmp_path / "run", resume=True)
    run = go(found, tmp_path / "run", resume=True)
    assert weights(run.folder) == weights(whole.folder)
