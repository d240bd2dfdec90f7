"""Two processes (gloo, on the CPU) train as one does: the same losses and weights, whether each has a copy of the
weights (DDP) or they are spread (FSDP2), and what one number of processes saved another goes on with.

Tolerance: gradients are sums in another order, so that losses and norms agree to 1e-4 of their value and weights,
compared with how far they moved, to 1e-3 on average (fp32; mostly to 1e-6, but an entry whose gradient is near 0 may
differ by a whole step of Adam's).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from several import KINDS, SMALL, carry_out, whole_run

from conftest import make_model, make_tokenizer
from posttrain.models.load import load
from posttrain.objective.batch import Batch
from posttrain.recipe import load_recipe
from posttrain.run import execute, resume_run
from posttrain.training.parallel import shares
from tiny_training import demonstrations

SCRIPT = Path(__file__).with_name("several.py")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
DDP, FSDP = False, True
# with both ways to hold weights; then what needs more than a loss: other rows' answers, a critic and a second backward
# pass, bf16, adapters, references that follow or answer for the whole vocabulary, experts that are
# replayed, layers that are computed again or in fewer bits
TRAINED = [(kind, shard) for kind in ("sft", "dpo", "grpo") for shard in (DDP, FSDP)] + [
    ("kto", DDP), ("normalised", FSDP), ("sft-low", FSDP), ("dpo-lora", FSDP), ("following", FSDP), ("full-kl", FSDP),
    ("experts", DDP), ("recomputed", FSDP), ("rounded", FSDP),
]  # fmt: skip
SAVED_BY_TWO = [("grpo", DDP), ("sft", FSDP), ("following", FSDP)]
SAVED_BY_ONE = [("sft", DDP), ("grpo", FSDP)]
TIMES = ("time", "seconds", "rollout_seconds", "update_seconds", "tokens_per_second", "completions_per_second")
Found = tuple[list[dict[str, float]], dict[str, torch.Tensor]]

TASK = {"file": [{"prompt": f"p{i}", "answer": "a", "solution": "a" * (i % 3 + 1)} for i in range(20)], "heldout": 5}
STEPS = 40  # of the run that is killed
STAGE = {"batch": 4, "learning_rate": 1e-3, "schedule": "constant", "warmup": 0.0}


def recipe(model: str, **sft: Any) -> dict[str, Any]:
    """SFT with early stopping looked at, then GRPO with a reward whose components are told apart."""
    reward = {"format": {"pattern": ".*[a-z].*"}, "length": {"maximum": 5, "unit": "characters", "weight": 0.2}}
    online = {**STAGE, "steps": 2, "group": 3, "max_tokens": 6, "reward": reward}
    return {
        "model": {"id": model, "precision": "fp32"}, "task": TASK, "seed": 3,
        "stages": [{"sft": {**STAGE, "steps": 4, "evaluate_every": 2, "patience": 2, **sft}}, {"grpo": online}],
        "evaluate": {"max_tokens": 4, "holdout": 5, "samples": 2},
    }  # fmt: skip


def together(jobs: list[dict[str, Any]], folder: Path) -> None:
    """Have two processes carry out the jobs."""
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = ENVIRONMENT | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    started = [
        subprocess.Popen([sys.executable, str(SCRIPT), str(file)], env=shared | {"RANK": str(r), "LOCAL_RANK": str(r)})
        for r in range(2)
    ]
    try:
        assert [process.wait(timeout=1200) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which two processes have done all that the tests look at."""
    folder = tmp_path_factory.mktemp("several")
    make_model().save_pretrained(folder / "model")
    make_tokenizer().save_pretrained(folder / "model")
    jobs: list[dict[str, Any]] = [{"kind": k, "shard": s, "out": str(folder / f"{k}-{s}")} for k, s in TRAINED]
    for kind, shard in SAVED_BY_TWO:
        where = str(folder / f"by-two-{kind}")
        jobs.append({"kind": kind, "shard": shard, "folder": where, "after": 2, "out": where})
    for kind, shard in SAVED_BY_ONE:
        where = str(folder / f"by-one-{kind}")
        carry_out({"kind": kind, "folder": where, "after": 2})
        jobs.append({"kind": kind, "shard": shard, "folder": where, "out": where})
    jobs.append({"recipe": recipe(str(folder / "model")), "folder": str(folder / "run"), "shard": FSDP})
    jobs.insert(0, {"saves": str(folder / "saved")})
    together(jobs, folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def alone() -> dict[str, Found]:
    """What one process makes of each kind, made once."""
    return {}


def one(kind: str, alone: dict[str, Found]) -> Found:
    if kind not in alone:
        alone[kind] = carry_out({"kind": kind})
    return alone[kind]


def result(out: Path) -> Found:
    """What two processes made of a job, which must be the same in both, bit for bit."""
    first, second = (load_file(out.with_suffix(f".{rank}.safetensors")) for rank in range(2))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first), "the processes' weights differ"
    metrics = [json.loads(out.with_suffix(f".{rank}.json").read_text()) for rank in range(2)]
    assert plain(metrics[0]) == plain(metrics[1])
    return metrics[0], first


def plain(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{name: value for name, value in row.items() if name not in TIMES} for row in metrics]


def assert_close(found: Found, expected: Found, kind: str, low: bool = False) -> None:
    (metrics, weights), (true_metrics, true_weights) = found, expected
    for row, true in zip(plain(metrics), plain(true_metrics)[-len(metrics) :], strict=True):
        assert row.keys() == true.keys()
        for name, value in true.items():
            exact = name in ("tokens", "rollouts", "skipped", "learning_rate", "length", "reward")
            close = pytest.approx(value, rel=5e-2 if low else 1e-4, abs=1e-2 if low else 1e-5)
            assert row[name] == (value if exact else close), (name, row[name], value)
    start = dict(KINDS[kind][1]().model.named_parameters())
    assert weights.keys() == true_weights.keys() == start.keys()
    apart = sum(float((weights[n].double() - true_weights[n].double()).abs().sum()) for n in weights)
    moved = sum(float((true_weights[n].double() - start[n].detach().double()).abs().sum()) for n in weights)
    assert moved > 0
    assert apart <= (0.1 if low else 1e-3) * moved, (apart, moved)


def test_the_processes_hold_different_numbers_of_tokens() -> None:
    """So that a mean over processes of their means would be another loss."""
    batch = Batch.of(demonstrations()[: SMALL["batch"]])
    assert len({int(batch.lengths[share].sum()) for share in shares(batch, 2)}) == 2


@pytest.mark.parametrize(("kind", "shard"), TRAINED)
def test_two_processes_train_as_one(kind: str, shard: bool, place: Path, alone: dict[str, Found]) -> None:
    assert_close(result(place / f"{kind}-{shard}"), one(kind, alone), kind, low=kind.endswith("-low"))


@pytest.mark.parametrize(("kind", "shard"), SAVED_BY_TWO)
def test_one_process_goes_on_with_what_two_saved(kind: str, shard: bool, place: Path, alone: dict[str, Found]) -> None:
    saved = place / f"by-two-{kind}" / "step-00000002"
    assert sorted(p.name for p in saved.iterdir()) == sorted(
        ["state.json", "tensors.safetensors"] + (["tensors-1.safetensors"] if shard else [])
    )
    assert_close(carry_out({"kind": kind, "folder": str(saved.parent)}), one(kind, alone), kind)


@pytest.mark.parametrize(("kind", "shard"), SAVED_BY_ONE)
def test_two_processes_go_on_with_what_one_saved(kind: str, shard: bool, place: Path, alone: dict[str, Found]) -> None:
    found = result(place / f"by-one-{kind}")
    assert len(found[0]) == 2, "it went on and did not begin again"
    assert_close(found, one(kind, alone), kind)


def test_each_process_can_write_a_model(place: Path) -> None:
    """As the one that is first at an empty cache does, whichever of them it is."""
    first, second = (load(place / "saved" / str(rank), precision="fp32") for rank in range(2))
    weights = second.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in first.model.state_dict().items())


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_a_whole_run_is_written_once_and_as_one_process_writes_it(place: Path, tmp_path: Path) -> None:
    whole_run({"recipe": recipe(str(place / "model")), "folder": str(tmp_path / "run"), "shard": None})
    two, single = place / "run", tmp_path / "run"
    assert {p.name for p in two.rglob("*")} == {p.name for p in single.rglob("*")}
    assert any(row.get("undecided", 0) > 0 for row in rows(single / "metrics.jsonl")), "no group has a gradient"
    metrics, true = plain(rows(two / "metrics.jsonl")), plain(rows(single / "metrics.jsonl"))
    assert [(m["stage"], m["step"], "loss" in m) for m in metrics] == [
        (m["stage"], m["step"], "loss" in m) for m in true
    ]
    for row, expected in zip(metrics, true, strict=True):
        for name, value in expected.items():
            assert row[name] == (pytest.approx(value, rel=1e-4, abs=1e-5) if isinstance(value, float) else value), name
    assert rows(two / "samples.jsonl") == rows(single / "samples.jsonl")
    for found, expected in zip(rows(two / "evaluations.jsonl"), rows(single / "evaluations.jsonl"), strict=True):
        assert {k: v for k, v in found.items() if k != "seconds"} == {
            k: v for k, v in expected.items() if k != "seconds"
        }
    states = [json.loads((folder / "run.json").read_text()) for folder in (two, single)]
    assert [state["status"] for state in states] == ["finished", "finished"]
    assert states[0]["notes"] == states[1]["notes"]
    model, true_model = (load_file(folder / "model" / "model.safetensors") for folder in (two, single))
    for name, value in true_model.items():
        torch.testing.assert_close(model[name], value, rtol=0, atol=1e-4)


def test_a_process_that_is_killed_ends_the_others_and_one_goes_on(place: Path, tmp_path: Path) -> None:
    """By torchrun, as a user starts it: the run stops with a line that says how to go on, and nothing is lost."""
    long = recipe(str(place / "model"), steps=STEPS, checkpoint_every=1, evaluate_every=0, patience=0)
    long["stages"] = long["stages"][:1]
    folder = tmp_path / "run"
    (tmp_path / "recipe.yaml").write_text(json.dumps(long))
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "posttrain", "run"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", *launch, str(tmp_path / "recipe.yaml"), "--output", str(folder)],
        env=ENVIRONMENT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        limit = time.monotonic() + 1200
        while not (file := folder / "metrics.jsonl").is_file() or file.read_text().count("\n") < 3:
            assert launcher.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.05)
        workers = psutil.Process(launcher.pid).children()
        (second,) = [worker for worker in workers if worker.environ().get("RANK") == "1"]
        second.send_signal(signal.SIGKILL)
        _, errors = launcher.communicate(timeout=300)
    finally:
        launcher.kill()
    assert launcher.returncode != 0
    (told,) = [line for line in errors.splitlines() if line.startswith("posttrain: ")]
    assert told.startswith("posttrain: process 0: ")
    assert told.endswith(f"go on with: posttrain run --resume {folder}")
    assert len(rows(folder / "metrics.jsonl")) < STEPS, "it was killed too late to tell"

    resume_run(folder, show=False)
    whole = execute(load_recipe(tmp_path / "recipe.yaml"), folder=tmp_path / "whole", show=False).folder
    assert [row["step"] for row in rows(folder / "metrics.jsonl")] == list(range(1, STEPS + 1))
    losses = [[row["loss"] for row in rows(where / "metrics.jsonl")] for where in (folder, whole)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
