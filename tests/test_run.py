"""Whole runs: what stands in their folder, how they stop, fail, and go on."""

from __future__ import annotations

import errno
import gc
import json
import os
import signal
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from conftest import make_model, make_tokenizer
from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.recipe import parse_recipe
from posttrain.run import Interrupted, Run, execute, resume_run
from posttrain.run_folder import RunFolder
from posttrain.training import checkpoint
from posttrain.trajectory import Group, PosttrainError, Trajectory

FAST = {"learning_rate": 1e-2, "warmup": 0.0, "schedule": "constant"}
CHATS = [
    {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}]} for i in range(20)
]
PAIRS = [{"prompt": f"q{i}", "chosen": "yes", "rejected": f"no {i}"} for i in range(12)]
MARKED = [{"prompt": f"q{i}", "completion": ("no", "yes")[i % 2], "label": i % 2 == 1} for i in range(12)]
TASK = {"file": [{"prompt": f"p{i}", "answer": "a", "solution": "a"} for i in range(24)], "heldout": 8}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def recipe(model: str, *stages: dict[str, Any], task: Any = None, **evaluate: Any) -> Any:
    given: dict[str, Any] = {
        "model": {"id": model, "precision": "fp32"},
        "stages": list(stages),
        "evaluate": {"max_tokens": 4, **evaluate},
    }
    return parse_recipe(given | ({"task": task} if task is not None else {}))


def go(found: Any, folder: Path, **options: Any) -> Run:
    return execute(found, folder=folder, show=False, **options)


def rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def state(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def jsonl(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


# -- what a run leaves -----------------------------------------------------------------------------------------------


def test_sft_on_a_file_of_chats(model: str, tmp_path: Path) -> None:
    data = {"source": jsonl(tmp_path / "chats.jsonl", CHATS), "heldout": 0.2}
    settings = {**FAST, "epochs": 8, "batch": 8, "evaluate_every": 4, "checkpoint_every": 3}
    run = go(recipe(model, {"sft": {**settings, "data": data}}), tmp_path / "run")
    assert run.summary() == f"trained model: {tmp_path / 'run' / 'model'}"
    assert (run.before, run.after) == (None, None)
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {".lock", "metrics.jsonl", "model", "recipe.yaml", "report.html", "run.json", "stages"}
    assert list((tmp_path / "run" / "stages" / "0-sft").iterdir()) == [], "checkpoints go when the model stands"

    metrics = rows(tmp_path / "run" / "metrics.jsonl")
    losses = [m["loss"] for m in metrics if "loss" in m]
    heldout = [(m["step"], m["heldout_loss"]) for m in metrics if "heldout_loss" in m]
    assert [m["step"] for m in metrics if "loss" in m] == list(range(1, 17)), "8 epochs of 16 rows, 8 a step"
    assert losses[-1] < losses[0] / 2
    assert [step for step, _ in heldout] == [4, 8, 12, 16]
    found = state(tmp_path / "run")
    assert (found["status"], found["stages"][0]["steps"], found["stages"][0]["kind"]) == ("finished", 16, "offline")
    assert {"torch", "transformers", "posttrain"} <= set(found["versions"])
    said = next(note for note in found["notes"] if note.startswith("sft: held-out loss "))
    before, after = map(float, said.removeprefix("sft: held-out loss ").split(" -> "))
    assert after == pytest.approx(heldout[-1][1], abs=1e-3)
    assert after < before
    assert any(note.startswith("20 rows from ") for note in found["notes"])


def test_the_saved_model_is_the_trained_one(model: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name, settings in {"full": {}, "lora": {"lora": 4}}.items():
        found = recipe(model, {"sft": {**FAST, **settings, "steps": 3, "batch": 4, "data": {"source": CHATS}}})
        run = go(found, tmp_path / name)
        saved = AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").eval()
        tokens = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / name / "model")("7?")["input_ids"]])
        with torch.no_grad():
            assert torch.equal(saved(tokens).logits, run.model.model(tokens).logits)
            start = AutoModelForCausalLM.from_pretrained(model).eval()(tokens).logits
            assert not torch.allclose(saved(tokens).logits, start, atol=1e-2)
        assert not run.model.adapted
        assert not run.model.model.training
        assert not any("lora" in key for key in saved.state_dict())
        assert {p.suffix for p in (tmp_path / name / "model").iterdir()} <= {".json", ".safetensors", ".jinja"}


@pytest.mark.parametrize("method", ["dpo", "simpo", "kto"])
def test_learning_from_preferences_and_feedback(method: str, model: str, tmp_path: Path) -> None:
    data = MARKED if method == "kto" else PAIRS
    source = {"source": jsonl(tmp_path / "rows.jsonl", data), "heldout": 4}
    found = recipe(model, {method: {**FAST, "learning_rate": 3e-3, "steps": 8, "batch": 8, "data": source}})
    go(found, tmp_path / "run")
    metrics = rows(tmp_path / "run" / "metrics.jsonl")
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    (said,) = [note for note in state(tmp_path / "run")["notes"] if "held-out loss" in note]
    before, after = map(float, said.removeprefix(f"{method}: held-out loss ").split(" -> "))
    if method == "dpo":
        assert before == pytest.approx(0.6931, abs=1e-4), "the policy is the reference at the start"
    assert after < before


def test_a_pipeline_on_a_task(model: str, tmp_path: Path) -> None:
    stages = (
        {"sft": {**FAST, "steps": 15, "batch": 8}},
        {"grpo": {**FAST, "lora": 4, "learning_rate": 3e-3, "steps": 4, "batch": 4, "group": 4, "max_tokens": 4,
                  "evaluate_every": 2, "evaluate_limit": 4}},
    )  # fmt: skip
    run = go(recipe(model, *stages, task=TASK, samples=2, k=[1, 2]), tmp_path / "run")
    assert run.before is not None
    assert run.after is not None
    assert run.before.accuracy.value == 0
    assert run.after.accuracy.value > 0.5
    before, after = run.before.accuracy, run.after.accuracy
    assert run.summary() == f"held-out accuracy: {before} -> {after} (n=8)"

    evaluations = rows(tmp_path / "run" / "evaluations.jsonl")
    assert [e["label"] for e in evaluations] == ["before", "after sft", "after grpo", "comparison"]
    assert [e.get("stage") for e in evaluations[:3]] == [-1, 0, 1]
    assert evaluations[2]["accuracy"] == run.after.accuracy.value
    assert evaluations[2]["pass_at_k"]["2"]["value"] >= evaluations[2]["accuracy"]
    assert evaluations[3]["difference"] == pytest.approx(after.value - before.value)
    samples = rows(tmp_path / "run" / "samples.jsonl")
    heldout = [s for s in samples if s["split"] == "heldout"]
    assert [(s["name"], s["stage"]) for s in heldout[::16]] == [("before", 0), ("after sft", 0), ("after grpo", 1)]
    assert len(heldout) == 3 * 8 * 2
    assert {(s["name"], s["stage"]) for s in samples if s["split"] == "train"} == {("grpo", 1)}
    metrics = rows(tmp_path / "run" / "metrics.jsonl")
    assert [(m["stage"], m["step"]) for m in metrics if "heldout_accuracy" in m] == [(1, 2), (1, 4)]
    assert (tmp_path / "run" / "stages" / "0-sft" / "model" / "config.json").is_file()
    assert "<html" in run.report.read_text()


def test_the_second_stage_starts_from_the_first(model: str, tmp_path: Path) -> None:
    """Held-out loss at the start of the second stage is that at the end of the first, LoRA merged in between."""
    stage = {"sft": {**FAST, "steps": 4, "batch": 8, "lora": 4, "data": {"source": CHATS, "heldout": 4}}}
    go(recipe(model, stage, stage), tmp_path / "run")
    first, second = [note for note in state(tmp_path / "run")["notes"] if "held-out loss" in note]
    assert first.split(" -> ")[1] == second.removeprefix("sft: held-out loss ").split(" -> ")[0]


def test_no_evaluation_before_on_demand(model: str, tmp_path: Path) -> None:
    found = recipe(model, {"sft": {**FAST, "steps": 2}}, task=TASK, before=False, holdout=4)
    run = go(found, tmp_path / "run")
    assert run.before is None
    assert run.after is not None
    assert run.summary() == f"held-out accuracy: {run.after.accuracy} (n=4)"


def test_stop_strings_of_the_task_hold_in_its_evaluations(model: str, tmp_path: Path) -> None:
    from dataclasses import replace

    from posttrain.evaluation.tasks import task_from
    from posttrain.trajectory import Sampling

    task = task_from({**TASK, "heldout": 4})
    task.sampling = Sampling(max_tokens=99, stop=(chr(0xFFFD), *map(chr, range(32, 127))))
    found = replace(recipe(model, {"sft": {**FAST, "steps": 1}}, task=TASK), task=task)
    run = go(found, tmp_path / "run")
    assert run.before is not None
    assert run.before.sampling is not None
    assert (run.before.sampling.max_tokens, run.before.sampling.temperature) == (4, 0.0)
    assert run.before.sampling.stop == task.sampling.stop


def test_rewards_that_raise_are_noted(model: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def broken(completion, prompt):\n    raise KeyError('nothing there')\n")
    stage = {"grpo": {"steps": 2, "batch": 2, "group": 2, "max_tokens": 3, "reward": f"{tmp_path}/broken.py:broken"}}
    go(recipe(model, stage, task=TASK), tmp_path / "run")
    (said,) = state(tmp_path / "run")["notes"]
    assert said == "grpo: rewards that raised: broken 8; the first: broken: KeyError: 'nothing there'"


# -- folders ---------------------------------------------------------------------------------------------------------


def small(model: str, **settings: Any) -> Any:
    return recipe(model, {"sft": {**FAST, "steps": 4, "batch": 4, "data": {"source": CHATS}, **settings}})


def test_an_existing_folder_is_refused_and_untouched(model: str, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(PosttrainError, match="mine exists and is no run; choose an output that does not exist yet"):
        go(small(model), tmp_path / "mine")
    with pytest.raises(PosttrainError, match="exists and is no run"):
        go(small(model), tmp_path / "mine", resume=True)
    (tmp_path / "file").write_text("text")
    with pytest.raises(PosttrainError, match="exists and is no run"):
        go(small(model), tmp_path / "file")
    assert contents(tmp_path) == {"mine/thesis.tex": b"years of work", "file": b"text"}

    go(small(model), tmp_path / "run")
    before = contents(tmp_path / "run")
    with pytest.raises(PosttrainError, match=r"run holds a run already; resume it \(posttrain run --resume .*run\)"):
        go(small(model), tmp_path / "run")
    with pytest.raises(PosttrainError, match="was started with another recipe than the one given"):
        go(small(model, steps=5), tmp_path / "run", resume=True)
    assert contents(tmp_path / "run") == before
    with pytest.raises(PosttrainError, match=r"is not a run folder: no run\.json in it"):
        resume_run(tmp_path / "mine")


def test_an_empty_folder_will_do(model: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert go(small(model), tmp_path / "run").folder == tmp_path / "run"


def test_a_finished_run_is_returned_at_once(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = recipe(model, {"sft": {**FAST, "steps": 3}}, task=TASK)
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
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model trained in memory, stopped and given again would be its own reference."""
    from posttrain.training.loop import Trainer

    found = recipe(model, {"dpo": {**FAST, "steps": 4, "batch": 4, "checkpoint_every": 1, "data": {"source": PAIRS}}})
    whole = go(found, tmp_path / "whole", policy=CausalPolicy(make_model(), make_tokenizer(), model))
    real = Trainer.step

    def step(self: Trainer, collected: Any) -> dict[str, float]:
        if self.progress.step == 2:
            raise ZeroDivisionError
        return real(self, collected)

    policy = CausalPolicy(make_model(), make_tokenizer(), model)
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


def test_default_folders_differ(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    runs = [execute(small(model, steps=1), show=False).folder for _ in range(2)]
    assert runs[0] != runs[1]
    assert all(run.parent == Path("runs") and run.name.startswith("sft-") for run in runs)


def test_one_process_at_a_time(model: str, tmp_path: Path) -> None:
    go(small(model), tmp_path / "run")
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
    number: int, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from posttrain.training.loop import Trainer

    whole = go(small(model, steps=6), tmp_path / "whole")
    real, handler = Trainer.step, signal.getsignal(number)

    def step(self: Trainer, collected: Any) -> dict[str, float]:
        if self.progress.step == 2:
            os.kill(os.getpid(), number)
        return real(self, collected)

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(Interrupted, match=r"stopped at step 3 of 6 of sft; .* go on with: posttrain run --resume"):
        execute(small(model, steps=6), folder=tmp_path / "run")
    assert "stopping after this step, with a checkpoint" in capsys.readouterr().err
    assert signal.getsignal(number) == handler
    assert state(tmp_path / "run")["status"] == "interrupted"
    assert [p.name for p in (tmp_path / "run" / "stages" / "0-sft" / "checkpoints").iterdir()] == ["step-00000003"]
    assert (tmp_path / "run" / "report.html").is_file()
    monkeypatch.setattr(Trainer, "step", real)
    run = resume_run(tmp_path / "run", show=False)
    assert state(tmp_path / "run")["status"] == "finished"
    assert weights(run.folder) == weights(whole.folder)


def test_the_second_signal_interrupts_at_once(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.training.loop import Trainer

    def step(self: Trainer, collected: Any) -> dict[str, float]:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("not reached")

    monkeypatch.setattr(Trainer, "step", step)
    with pytest.raises(Interrupted, match="stopped; what is finished is kept; go on with: posttrain run --resume"):
        go(small(model), tmp_path / "run")
    assert state(tmp_path / "run")["status"] == "interrupted"


def test_a_run_outside_the_main_thread_leaves_signals_alone(model: str, tmp_path: Path) -> None:
    done: list[Run] = []
    thread = threading.Thread(target=lambda: done.append(go(small(model), tmp_path / "run")))
    thread.start()
    thread.join()
    assert state(done[0].folder)["status"] == "finished"


@pytest.mark.parametrize("lora", [0, 4])
def test_a_failed_run_keeps_its_checkpoint_and_goes_on(
    lora: int, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.training.loop import Trainer

    found = small(model, steps=6, checkpoint_every=2, lora=lora)
    whole = go(found, tmp_path / "whole")
    real = Trainer.step

    def step(self: Trainer, collected: Any) -> dict[str, float]:
        if self.progress.step == 3:
            raise ZeroDivisionError("a bug in the middle")
        return real(self, collected)

    policy = CausalPolicy(make_model(), make_tokenizer(), model)
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
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from posttrain.training import loop

    monkeypatch.setattr(loop, "learning_rate", lambda *_: float("nan"))
    with pytest.raises(PosttrainError, match="2 updates in a row were not finite"):
        go(small(model, max_skipped=2), tmp_path / "run")
    notes = state(tmp_path / "run")["notes"]
    assert notes[-1].startswith("failed: 2 updates in a row")
    assert sum("the update was skipped" in note for note in notes) == 2


def test_a_full_disk_is_a_line_for_the_user(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.training.track import Tracker

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    found = small(model, checkpoint_every=2)
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


# -- what is checked -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heldout", "message"),
    [(20, "heldout is 20 of 20 rows; nothing is left"), (30, "heldout is 30 of 20 rows"), (0.999, "nothing is left")],
)
def test_heldout_leaves_something(heldout: float, message: str, model: str, tmp_path: Path) -> None:
    found = recipe(model, {"sft": {"data": {"source": CHATS, "heldout": heldout}}})
    with pytest.raises(PosttrainError, match=message):
        go(found, tmp_path / "run")


def test_a_small_share_holds_out_one_row(model: str, tmp_path: Path) -> None:
    found = recipe(model, {"sft": {**FAST, "batch": 19, "data": {"source": CHATS, "heldout": 0.01}}})
    go(found, tmp_path / "run")
    assert any("held-out loss" in note for note in state(tmp_path / "run")["notes"])
    assert state(tmp_path / "run")["stages"][0]["steps"] == 1


def test_heldout_rows_are_not_trained_on(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import posttrain.run as module

    seen: dict[str, list[Group]] = {}
    real = module.Offline

    def offline(groups: list[Group], *args: Any) -> Any:
        seen["train"] = groups
        return real(groups, *args)

    def measured(trainer: Any, groups: list[Group]) -> float:
        seen["heldout"] = groups
        return 0.0

    monkeypatch.setattr(module, "Offline", offline)
    monkeypatch.setattr(module, "heldout_loss", measured)
    go(recipe(model, {"sft": {"steps": 1, "data": {"source": CHATS, "heldout": 0.25}}}), tmp_path / "run")
    assert (len(seen["train"]), len(seen["heldout"])) == (15, 5)
    texts = {tuple(g.trajectories[0].tokens.tolist()) for kind in seen.values() for g in kind}
    assert len(texts) == 20


def test_the_reference_goes_with_its_stage(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.training.loop import Trainer

    copies: list[Any] = []
    alive: list[int] = []
    real = CausalPolicy.frozen_copy

    def counted(self: CausalPolicy) -> CausalPolicy:
        gc.collect()
        alive.append(sum(copy() is not None for copy in copies))
        copy = real(self)
        copies.append(weakref.ref(copy.model))
        return copy

    monkeypatch.setattr(CausalPolicy, "frozen_copy", counted)
    trainers: list[Any] = []
    init = Trainer.__init__

    def remember(self: Trainer, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        trainers.append(weakref.ref(self))

    monkeypatch.setattr(Trainer, "__init__", remember)
    stage = {"dpo": {**FAST, "steps": 1, "batch": 4, "data": {"source": PAIRS, "heldout": 2}}}
    run = go(recipe(model, stage, {"sft": {"steps": 1, "data": {"source": CHATS}}}, stage), tmp_path / "run")
    gc.collect()
    assert alive == [0, 0], "one for each dpo, none beside another"
    assert [copy() for copy in copies] == [None, None]
    assert [trainer() for trainer in trainers] == [None] * 3
    tokens = torch.arange(5)
    batch = Batch.of([Group([Trajectory(tokens, tokens > 1)])])
    assert run.model.log_likelihood(batch).logp.requires_grad
