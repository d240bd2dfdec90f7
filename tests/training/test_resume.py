"""Runs killed with SIGKILL at random moments and resumed end in the same bytes as runs that were never killed."""

from __future__ import annotations

import glob
import json
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import make_model, make_tokenizer
from tiny_training import make_dropout_model

SCRIPT = Path(__file__).with_name("killable.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
TIMES = ("time", "seconds", "rollout_seconds", "update_seconds", "tokens_per_second", "completions_per_second")


class Server:
    """A warm process that forks a child for every run (see killable.py)."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
        )
        assert self._line() == "ready"

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def run(self, request: dict[str, Any], moment: Callable[[], bool] = lambda: False) -> int:
        """Carry a run out; kill it at the moment. Returns its exit status."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        child = int(self._line())
        deadline = time.monotonic() + 300
        while not select.select([self.process.stdout], [], [], 0.001)[0]:
            if moment() or time.monotonic() > deadline:
                os.kill(child, signal.SIGKILL)
                break
        return int(self._line())

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A tiny Llama, and a tiny GPT-2 whose dropout draws from the global generator at every step."""
    made = {"llama": make_model(), "gpt2": make_dropout_model()}
    folder = tmp_path_factory.mktemp("models")
    for name, model in made.items():
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    return {name: str(folder / name) for name in made}


# -- the runs --------------------------------------------------------------------------------------------------------

TASK = {"file": [{"prompt": f"p{i}", "answer": "a", "solution": "a" * (i % 3 + 1)} for i in range(30)], "heldout": 6}
CHATS = [{"prompt": f"say {i}", "completion": f"{i} and {i * i % 7}"} for i in range(24)]
PAIRS = [{"prompt": f"q{i}", "chosen": "yes " * (1 + i % 3), "rejected": f"no {i}"} for i in range(24)]
MARKED = [{"prompt": f"q{i}", "completion": f"{i % 5}!", "label": i % 2 == 0} for i in range(24)]
SHORT = {"max_tokens": 6, "before": True, "holdout": 4}
REWARD = f"{SCRIPT}:reward"


def recipe(model: str, precision: str, *stages: dict[str, Any], task: Any = None, **more: Any) -> dict[str, Any]:
    given = {"model": {"id": model, "precision": precision}, "stages": list(stages), "evaluate": SHORT, "seed": 3}
    return given | ({"task": task} if task is not None else {}) | more


def recipes(models: dict[str, str]) -> dict[str, dict[str, Any]]:
    offline: dict[str, Any] = {"steps": 24, "batch": 4, "checkpoint_every": 2, "learning_rate": 1e-3}
    online: dict[str, Any] = {
        "steps": 20, "batch": 2, "group": 4, "max_tokens": 6, "checkpoint_every": 1, "learning_rate": 1e-3,
        "reward": REWARD,
    }  # fmt: skip
    best = {"evaluate_every": 3, "patience": 5}
    return {
        # dropout, evaluation and early stopping in the middle
        "sft": recipe(models["gpt2"], "fp32", {"sft": {**offline, **best, "data": {"source": CHATS, "heldout": 4}}}),
        "dpo": recipe(models["llama"], "bf16", {"dpo": {**offline, "lora": 4, "data": {"source": PAIRS}}}),
        "kto": recipe(models["llama"], "fp32", {"kto": {**offline, "weight_decay": 0.1, "data": {"source": MARKED}}}),
        "grpo": recipe(
            models["llama"], "fp32", {"grpo": {**online, "beta": 0.1, "updates": 2, "minibatches": 2}}, task=TASK
        ),
        "ppo": recipe(models["llama"], "bf16", {"ppo": {**online, "evaluate_every": 4}}, task=TASK),
        "pipeline": recipe(
            models["llama"],
            "bf16",
            {"sft": {**offline, "steps": 8, "lora": 4}},
            {"dapo": {**online, "steps": 8, "lora": 4, **best}},
            task=TASK,
        ),
    }


# -- moments ---------------------------------------------------------------------------------------------------------


def there(folder: Path, *patterns: str) -> set[str]:
    """What matches now, while another process makes and removes things (`Path.glob` stumbles over that)."""
    return {found for pattern in patterns for found in glob.glob(str(folder / pattern))}  # noqa: PTH207


def lines(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.is_file() else 0


def after_steps(folder: Path, mix: random.Random) -> Callable[[], bool]:
    """Some milliseconds after a further step was logged."""
    begun, wait = lines(folder / "metrics.jsonl"), mix.random() * 0.1
    seen: list[float] = []

    def moment() -> bool:
        if not seen and lines(folder / "metrics.jsonl") > begun:
            seen.append(time.monotonic() + wait)
        return bool(seen) and time.monotonic() >= seen[0]

    return moment


def at_the_first_line(folder: Path, mix: random.Random) -> Callable[[], bool]:
    """When something was logged and no checkpoint may be there yet."""
    return lambda: lines(folder / "metrics.jsonl") > 0


def while_writing(folder: Path, mix: random.Random) -> Callable[[], bool]:
    """In the middle of writing a checkpoint, not always the first."""
    passing = mix.randrange(1, 4)
    seen: set[str] = set()

    def moment() -> bool:
        writing = [
            *folder.glob("stages/*/checkpoints/.writing-*"),
            *folder.glob("stages/*/checkpoints/best/.writing-*"),
        ]
        done = {p.name for p in folder.glob("stages/*/checkpoints/step-*")}
        seen.update(done)
        return bool(writing) and len(seen) >= passing

    return moment


def saving_model(folder: Path, mix: random.Random) -> Callable[[], bool]:
    return lambda: bool(there(folder, ".model-writing", "stages/*/.model-writing"))


def model_saved(folder: Path, mix: random.Random) -> Callable[[], bool]:
    """Just after a stage's model stands: its evaluation is not written yet."""
    before = there(folder, "model", "stages/*/model")
    return lambda: bool(there(folder, "model", "stages/*/model") - before)


def evaluated(folder: Path, mix: random.Random) -> Callable[[], bool]:
    """While the lines of an evaluation are being written."""
    begun = lines(folder / "evaluations.jsonl")
    return lambda: lines(folder / "evaluations.jsonl") > begun or bool(there(folder, ".samples.jsonl.writing"))


def at_once(folder: Path, mix: random.Random) -> Callable[[], bool]:
    """While the run is being opened."""
    end = time.monotonic() + 0.1 * mix.random()
    return lambda: time.monotonic() >= end


OFTEN = (after_steps, while_writing)


def moments(recipe: dict[str, Any], folder: Path, mix: random.Random) -> Iterator[Callable[[], bool]]:
    """Moments to kill at: at first when it matters most, then while training, at last around the saving of models."""
    evaluating = [evaluated] if "task" in recipe else []
    training = [*OFTEN, *OFTEN, *mix.sample(OFTEN * 2, 3)]
    for make in (at_once, *evaluating, at_the_first_line, *training, saving_model, *evaluating, model_saved):
        yield make(folder, mix)


# -- what must be equal ----------------------------------------------------------------------------------------------


def rows(file: Path, *without: str) -> list[dict[str, Any]]:
    # not splitlines: a completion may hold any other end of a line
    found = [json.loads(x) for x in file.read_text(encoding="utf-8").split("\n") if x] if file.is_file() else []
    return [{k: v for k, v in row.items() if k not in without} for row in found]


def taken(folder: Path) -> dict[tuple[str, int], list[int]]:
    """The rows of each step, as the last process that did the step took them."""
    return {(kind, step): rows for _, kind, step, rows in map(json.loads, _lines(folder.with_name("taken.jsonl")))}


def _lines(file: Path) -> list[str]:
    """Complete lines (a killed process may have been writing one)."""
    return [line for line in file.read_text().splitlines(keepends=True) if line.endswith("]\n")]


def assert_same(killed: Path, whole: Path) -> None:
    for model in whole.glob("**/model.safetensors"):
        assert (killed / model.relative_to(whole)).read_bytes() == model.read_bytes(), model
    metrics = rows(killed / "metrics.jsonl", *TIMES)
    keys = [(row["stage"], row["step"], "loss" in row) for row in metrics]
    assert len(keys) == len(set(keys)), "a step was logged twice"
    assert metrics == rows(whole / "metrics.jsonl", *TIMES)
    assert rows(killed / "samples.jsonl") == rows(whole / "samples.jsonl")
    assert rows(killed / "evaluations.jsonl", *TIMES) == rows(whole / "evaluations.jsonl", *TIMES)
    assert taken(killed) == taken(whole)
    state = json.loads((killed / "run.json").read_text())
    assert state["status"] == "finished"
    assert state["notes"] == json.loads((whole / "run.json").read_text())["notes"]
    left = [p for p in killed.rglob("*") if "writing" in p.name or p.name.startswith("step-")]
    assert not left, "a killed process's scratch or a finished stage's checkpoints were left"


@pytest.mark.parametrize("name", ["sft", "dpo", "kto", "grpo", "ppo", "pipeline"])
def test_a_killed_run_ends_in_the_same_bytes(name: str, tmp_path: Path, models: dict[str, str], server: Server) -> None:
    chosen = recipes(models)[name]
    whole, killed = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    for folder in (whole, killed):
        folder.parent.mkdir()
    assert server.run({"recipe": chosen, "folder": str(whole)}) == 0
    assert lines(whole / "metrics.jsonl") >= 8

    mix = random.Random(name)
    statuses = []
    for moment in moments(chosen, killed, mix):
        statuses.append(server.run({"recipe": chosen, "folder": str(killed)}, moment))
        if statuses[-1] != -signal.SIGKILL:
            break
    else:
        statuses.append(server.run({"recipe": chosen, "folder": str(killed)}))
    assert statuses[-1] == 0
    starts: dict[int, int] = {}
    for process, _, step, _ in map(json.loads, _lines(killed.with_name("taken.jsonl"))):
        starts.setdefault(process, step)
    assert statuses.count(-signal.SIGKILL) >= 5
    assert sum(step > 0 for step in starts.values()) >= 2, "no run went on from a checkpoint"
    assert_same(killed, whole)


def test_fresh_processes_agree(tmp_path: Path, models: dict[str, str]) -> None:
    """The same with interpreters of their own, whose hash seeds and memory layout differ."""
    chosen = recipes(models)["grpo"]
    whole, killed = tmp_path / "whole" / "run", tmp_path / "killed" / "run"
    mix = random.Random(1)
    for folder in (whole, killed):
        folder.parent.mkdir()
        command = [sys.executable, str(SCRIPT), "--once", json.dumps({"recipe": chosen, "folder": str(folder)})]
        if folder == killed:
            process = subprocess.Popen(command, env=ENVIRONMENT)
            moment = after_steps(folder, mix)
            while process.poll() is None and not moment():
                time.sleep(0.0005)
            process.kill()
            assert process.wait() == -signal.SIGKILL
        subprocess.run(command, env=ENVIRONMENT, check=True)
    assert_same(killed, whole)
