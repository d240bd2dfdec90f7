"""Ctrl-C: the run stops with a checkpoint and says how to go on, and going on ends as if nothing had been."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from commands import call, make_folder, status, weights, write_recipe, write_reward, write_rows

from posttrain.trajectory import PosttrainError

STEPS = {"steps": 4, "batch": 1, "group": 2, "max_tokens": 3}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"))


def go_on(capsys: pytest.CaptureFixture[str], error: str) -> Path:
    """Carry out the command that an interrupted run told; returns the run folder."""
    _, _, command = error.partition("go on with: posttrain ")
    arguments = shlex.split(command)
    assert arguments[:2] == ["run", "--resume"]
    done = call(capsys, *arguments)
    assert done.code == 0, done.err
    assert done.out.splitlines()[-1].startswith("held-out accuracy: ")
    return Path(arguments[2])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> bytes:
    """The weights that a run ends in when nobody interrupts it."""
    from posttrain.recipe import load_recipe
    from posttrain.run import execute

    folder = tmp_path_factory.mktemp("undisturbed")
    reward = write_reward(folder, "quiet", 0, "pass")
    recipe = write_recipe(folder, tiny, {"grpo": {**STEPS, "reward": reward}})
    execute(load_recipe(recipe), folder=folder / "out", show=False)
    return weights(folder / "out")


def test_ctrl_c_in_a_process_of_its_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, undisturbed: bytes
) -> None:
    reward = write_reward(tmp_path, "slow", 3, "pathlib.Path('training').touch(); time.sleep(1)")
    recipe = write_recipe(tmp_path, tiny, {"grpo": {**STEPS, "reward": reward}})
    command = [sys.executable, "-m", "posttrain.cli.main", "run", str(recipe), "--output", "my run"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if line.startswith("grpo 1/4"):
                break
        while not (tmp_path / "training").exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, ""), [*said, err]
    first, *_, last = err.splitlines()
    assert first == "stopping after this step, with a checkpoint (press Ctrl-C again to stop at once)"
    assert last.startswith("posttrain: stopped at step 2 of 4 of grpo; the checkpoint is kept; go on with: ")
    assert list((tmp_path / "my run" / "stages" / "0-grpo" / "checkpoints").glob("step-00000002"))
    os.chdir(tmp_path)
    assert weights(go_on(capsys, last)) == undisturbed


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_stopping_leaves_a_checkpoint_and_the_report(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, undisturbed: bytes, name: str
) -> None:
    reward = write_reward(tmp_path, "stops", 5, f"signal.raise_signal(signal.{name})")
    recipe = write_recipe(tmp_path, tiny, {"grpo": {**STEPS, "reward": reward}})
    done = call(capsys, "run", recipe, "--output", tmp_path / "out")
    assert (done.code, done.out) == (130, "")
    assert done.error.startswith("stopped at step 3 of 4 of grpo; the checkpoint is kept; go on with: ")
    assert status(tmp_path / "out") == "interrupted"
    assert (tmp_path / "out" / "report.html").exists()
    assert weights(go_on(capsys, done.error)) == undisturbed


def test_the_second_time_stops_at_once(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, undisturbed: bytes
) -> None:
    """Without a checkpoint of this step: the run goes on from the one before, or from the beginning of the stage."""
    twice = "signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGINT)"
    reward = write_reward(tmp_path, "stops", 5, twice)
    recipe = write_recipe(tmp_path, tiny, {"grpo": {**STEPS, "checkpoint_every": 1, "reward": reward}})
    done = call(capsys, "run", recipe, "--output", tmp_path / "out")
    assert (done.code, done.out) == (130, "")
    assert done.error.startswith("stopped; what is finished is kept; go on with: ")
    assert status(tmp_path / "out") == "interrupted"
    assert list((tmp_path / "out" / "stages" / "0-grpo" / "checkpoints").glob("step-00000002"))
    assert weights(go_on(capsys, done.error)) == undisturbed


@pytest.mark.parametrize("call_number", [2, 6])
def test_stopping_an_evaluation(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, call_number: int
) -> None:
    """Nothing is lost by stopping an evaluation, so that it stops at once."""
    reward = write_reward(tmp_path, "stops", call_number, "signal.raise_signal(signal.SIGINT)")
    write_rows(tmp_path / "rows.jsonl", *({"prompt": text, "answer": "b"} for text in "abcdef"))
    task = {"file": str(tmp_path / "rows.jsonl"), "heldout": 4, "reward": reward}
    recipe = write_recipe(tmp_path, tiny, {"sft": {"steps": 1}}, task=task)
    done = call(capsys, "run", recipe, "--output", tmp_path / "out")
    assert (done.code, done.out) == (130, "")
    assert done.error.startswith("stopped; what is finished is kept; go on with: ")
    assert (tmp_path / "out" / "model").exists() == (call_number == 6)
    go_on(capsys, done.error)


def test_an_interrupt_that_a_library_makes_another_error_of(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `transformers` does when it is interrupted in the middle of an import."""

    def loading(**options: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise PosttrainError("cannot load: could not import module") from None

    with monkeypatch.context() as patched:
        patched.setattr("posttrain.run.load", loading)
        done = call(capsys, "run", write_recipe(tmp_path, tiny), "--output", tmp_path / "out")
    assert done.code == 130
    assert done.error.startswith("stopped; what is finished is kept; go on with: ")
    go_on(capsys, done.error)


def test_a_checkpoint_cut_short(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, undisturbed: bytes
) -> None:
    """One line; the run stays as it is, and goes on when the checkpoint is whole again."""
    reward = write_reward(tmp_path, "stops", 3, "signal.raise_signal(signal.SIGINT)")
    recipe = write_recipe(tmp_path, tiny, {"grpo": {**STEPS, "reward": reward}})
    stopped = call(capsys, "run", recipe, "--output", tmp_path / "out")
    assert stopped.code == 130
    (checkpoint,) = (tmp_path / "out" / "stages" / "0-grpo" / "checkpoints").glob("step-*")
    for file in sorted(checkpoint.iterdir()):
        content = file.read_bytes()
        os.truncate(file, len(content) // 2)
        done = call(capsys, "run", "--resume", tmp_path / "out")
        assert (done.code, done.out) == (1, "")
        assert done.error.startswith(f"error: {checkpoint} is incomplete (cut short)")
        file.write_bytes(content)
    assert weights(go_on(capsys, stopped.error)) == undisturbed


def test_ctrl_c_before_anything_is_done(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def loading(path: Path, overrides: list[str]) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("posttrain.recipe.load_recipe", loading)
    done = call(capsys, "run", "recipe.yaml")
    assert (done.code, done.out, done.error) == (130, "", "interrupted")


def test_an_interrupt_of_which_a_library_makes_a_fault(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the run listens; nobody is asked to report it."""

    def loading(*given: object) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            raise RuntimeError("cannot import a module") from None

    monkeypatch.setattr("posttrain.recipe.load_recipe", loading)
    done = call(capsys, "run", "recipe.yaml")
    assert (done.code, done.out, done.error) == (130, "", "interrupted")


def test_a_launcher_that_ends_the_others_does_not_cut_off_their_last_words(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of several processes has failed and leaves `execute`; TERM comes before it has told why."""

    def failing(*given: object, **options: object) -> None:
        try:
            raise PosttrainError("another process has ended; go on with: posttrain run --resume here")
        finally:
            signal.raise_signal(signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("posttrain.run.execute", failing)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    done = call(capsys, "run", write_recipe(tmp_path, tiny), "--output", tmp_path / "out")
    assert done.code == 1
    told = "process 0: error: another process has ended; go on with: posttrain run --resume here"
    assert done.error == told
    assert signal.getsignal(signal.SIGTERM) == handler
