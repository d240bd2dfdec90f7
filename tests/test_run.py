"""Whole runs: what stands in their folder, and what they check."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.trajectory import Group, PosttrainError, Trajectory
from run_recipes import CHATS, FAST, MARKED, PAIRS, TASK, go, jsonl, recipe, rows, state

# -- what a run leaves -----------------------------------------------------------------------------------------------


def test_sft_on_a_file_of_chats(saved: str, tmp_path: Path) -> None:
    data = {"source": jsonl(tmp_path / "chats.jsonl", CHATS), "heldout": 0.2}
    settings = {**FAST, "epochs": 8, "batch": 8, "evaluate_every": 4, "checkpoint_every": 3}
    run = go(recipe(saved, {"sft": {**settings, "data": data}}), tmp_path / "run")
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


def test_the_saved_model_is_the_trained_one(saved: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for name, settings in {"full": {}, "lora": {"lora": 4}}.items():
        found = recipe(saved, {"sft": {**FAST, **settings, "steps": 3, "batch": 4, "data": {"source": CHATS}}})
        run = go(found, tmp_path / name)
        trained = AutoModelForCausalLM.from_pretrained(tmp_path / name / "model").eval()
        tokens = torch.tensor([AutoTokenizer.from_pretrained(tmp_path / name / "model")("7?")["input_ids"]])
        with torch.no_grad():
            assert torch.equal(trained(tokens).logits, run.model.model(tokens).logits)
            start = AutoModelForCausalLM.from_pretrained(saved).eval()(tokens).logits
            assert not torch.allclose(trained(tokens).logits, start, atol=1e-2)
        assert not run.model.adapted
        assert not run.model.model.training
        assert not any("lora" in key for key in trained.state_dict())
        assert {p.suffix for p in (tmp_path / name / "model").iterdir()} <= {".json", ".safetensors", ".jinja"}


@pytest.mark.parametrize("method", ["dpo", "simpo", "kto"])
def test_learning_from_preferences_and_feedback(method: str, saved: str, tmp_path: Path) -> None:
    data = MARKED if method == "kto" else PAIRS
    source = {"source": jsonl(tmp_path / "rows.jsonl", data), "heldout": 4}
    found = recipe(saved, {method: {**FAST, "learning_rate": 3e-3, "steps": 8, "batch": 8, "data": source}})
    go(found, tmp_path / "run")
    metrics = rows(tmp_path / "run" / "metrics.jsonl")
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    (said,) = [note for note in state(tmp_path / "run")["notes"] if "held-out loss" in note]
    before, after = map(float, said.removeprefix(f"{method}: held-out loss ").split(" -> "))
    if method == "dpo":
        assert before == pytest.approx(0.6931, abs=1e-4), "the policy is the reference at the start"
    assert after < before


def test_a_pipeline_on_a_task(saved: str, tmp_path: Path) -> None:
    stages = (
        {"sft": {**FAST, "steps": 15, "batch": 8}},
        {"grpo": {**FAST, "lora": 4, "learning_rate": 3e-3, "steps": 4, "batch": 4, "group": 4, "max_tokens": 4,
                  "evaluate_every": 2, "evaluate_limit": 4}},
    )  # fmt: skip
    run = go(recipe(saved, *stages, task=TASK, samples=2, k=[1, 2]), tmp_path / "run")
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


def test_the_second_stage_starts_from_the_first(saved: str, tmp_path: Path) -> None:
    """Held-out loss at the start of the second stage is that at the end of the first, LoRA merged in between."""
    stage = {"sft": {**FAST, "steps": 4, "batch": 8, "lora": 4, "data": {"source": CHATS, "heldout": 4}}}
    go(recipe(saved, stage, stage), tmp_path / "run")
    first, second = [note for note in state(tmp_path / "run")["notes"] if "held-out loss" in note]
    assert first.split(" -> ")[1] == second.removeprefix("sft: held-out loss ").split(" -> ")[0]


def test_no_evaluation_before_on_demand(saved: str, tmp_path: Path) -> None:
    found = recipe(saved, {"sft": {**FAST, "steps": 2}}, task=TASK, before=False, holdout=4)
    run = go(found, tmp_path / "run")
    assert run.before is None
    assert run.after is not None
    assert run.summary() == f"held-out accuracy: {run.after.accuracy} (n=4)"


def test_stop_strings_of_the_task_hold_in_its_evaluations(saved: str, tmp_path: Path) -> None:
    from dataclasses import replace

    from posttrain.evaluation.tasks import task_from
    from posttrain.trajectory import Sampling

    task = task_from({**TASK, "heldout": 4})
    task.sampling = Sampling(max_tokens=99, stop=(chr(0xFFFD), *map(chr, range(32, 127))))
    found = replace(recipe(saved, {"sft": {**FAST, "steps": 1}}, task=TASK), task=task)
    run = go(found, tmp_path / "run")
    assert run.before is not None
    assert run.before.sampling is not None
    assert (run.before.sampling.max_tokens, run.before.sampling.temperature) == (4, 0.0)
    assert run.before.sampling.stop == task.sampling.stop


def test_rewards_that_raise_are_noted(saved: str, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def broken(completion, prompt):\n    raise KeyError('nothing there')\n")
    stage = {"grpo": {"steps": 2, "batch": 2, "group": 2, "max_tokens": 3, "reward": f"{tmp_path}/broken.py:broken"}}
    go(recipe(saved, stage, task=TASK), tmp_path / "run")
    (said,) = state(tmp_path / "run")["notes"]
    assert said == "grpo: rewards that raised: broken 8; the first: broken: KeyError: 'nothing there'"


# -- what is checked -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heldout", "message"),
    [(20, "heldout is 20 of 20 rows; nothing is left"), (30, "heldout is 30 of 20 rows"), (0.999, "nothing is left")],
)
def test_heldout_leaves_something(heldout: float, message: str, saved: str, tmp_path: Path) -> None:
    found = recipe(saved, {"sft": {"data": {"source": CHATS, "heldout": heldout}}})
    with pytest.raises(PosttrainError, match=message):
        go(found, tmp_path / "run")


def test_a_small_share_holds_out_one_row(saved: str, tmp_path: Path) -> None:
    found = recipe(saved, {"sft": {**FAST, "batch": 19, "data": {"source": CHATS, "heldout": 0.01}}})
    go(found, tmp_path / "run")
    assert any("held-out loss" in note for note in state(tmp_path / "run")["notes"])
    assert state(tmp_path / "run")["stages"][0]["steps"] == 1


def test_heldout_rows_are_not_trained_on(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    go(recipe(saved, {"sft": {"steps": 1, "data": {"source": CHATS, "heldout": 0.25}}}), tmp_path / "run")
    assert (len(seen["train"]), len(seen["heldout"])) == (15, 5)
    texts = {tuple(g.trajectories[0].tokens.tolist()) for kind in seen.values() for g in kind}
    assert len(texts) == 20


def test_the_reference_goes_with_its_stage(saved: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    run = go(recipe(saved, stage, {"sft": {"steps": 1, "data": {"source": CHATS}}}, stage), tmp_path / "run")
    gc.collect()
    assert alive == [0, 0], "one for each dpo, none beside another"
    assert [copy() for copy in copies] == [None, None]
    assert [trainer() for trainer in trainers] == [None] * 3
    tokens = torch.arange(5)
    batch = Batch.of([Group([Trajectory(tokens, tokens > 1)])])
    assert run.model.log_likelihood(batch).logp.requires_grad
