"""The run folder: what a killed and resumed run writes twice stands there once; what is half written does not count."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from conftest import make_model, make_tokenizer
from posttrain import methods
from posttrain.evaluation.evaluation import Evaluation, compare
from posttrain.evaluation.tasks import from_rows
from posttrain.models.causal import CausalPolicy
from posttrain.recipe import ModelSpec, Recipe, StageSpec
from posttrain.reward.reward import Reward, reward_from
from posttrain.run_folder import RunFolder, only_in_python, plain
from posttrain.trajectory import PosttrainError, Sampling

RECIPE = Recipe(ModelSpec(id="tiny"), (StageSpec(methods.sft()), StageSpec(methods.grpo())), {"file": []})


def opened(path: Path, resume: bool = False) -> RunFolder:
    return RunFolder.open(path, RECIPE, resume=resume, command=None, task=None)


def evaluation(right: int, completion: str = "text") -> Evaluation:
    count = 4
    correct = np.arange(count)[:, None] < right
    return Evaluation(
        task="t",
        questions=[f"q{i}" for i in range(count)],
        answers=[None] * count,
        keys=list(range(count)),
        completions=[[completion]] * count,
        values=correct.astype(float),
        correct=correct,
        parts={"right": correct.astype(float)},
        tokens=np.ones((count, 1), dtype=np.int64),
        stopped=np.ones((count, 1), dtype=np.bool_),
        sampling=Sampling(),
    )


def rows(file: Path) -> list[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_an_evaluation_that_is_written_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    """As after a kill between its lines and the file that says it is done."""
    folder = opened(tmp_path / "run")
    strange = "one\u2028two\x85three"
    folder.add_evaluation(evaluation(0, strange), -1, "before", 1.0)
    folder.add_evaluation(evaluation(2), 0, "after sft", 1.0)
    for file in ("evaluations.jsonl", "samples.jsonl"):
        with (tmp_path / "run" / file).open("a") as lines:
            lines.write('{"label": "after grpo", "stage"')
    folder.add_evaluation(evaluation(3), 1, "after grpo", 1.0)
    folder.add_evaluation(evaluation(3), 1, "after grpo", 2.0)
    folder.add_evaluation(evaluation(0, strange), -1, "before", 3.0)
    before, after = folder.evaluation(-1), folder.evaluation(1)
    assert before is not None
    assert after is not None
    for _ in range(2):
        folder.add_comparison(compare(before, after))

    written = rows(tmp_path / "run" / "evaluations.jsonl")
    assert sorted(line["label"] for line in written) == ["after grpo", "after sft", "before", "comparison"]
    assert {line["label"]: line.get("seconds") for line in written}["after grpo"] == 2.0
    samples = rows(tmp_path / "run" / "samples.jsonl")
    assert len(samples) == 3 * 4
    assert {s["completion"] for s in samples if s["name"] == "before"} == {strange}
    assert after.accuracy.value == 0.75
    assert folder.evaluation(0) is not None
    assert RunFolder.read(tmp_path / "run").evaluation(7) is None


def test_two_stages_of_one_method_keep_their_evaluations_apart(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    for stage in (0, 1):
        folder.add_evaluation(evaluation(stage), stage, "after sft", 1.0)
    assert [row["stage"] for row in rows(tmp_path / "run" / "evaluations.jsonl")] == [0, 1]
    assert len(rows(tmp_path / "run" / "samples.jsonl")) == 8


def test_notes_stand_once(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    folder.note("one", "two", "one")
    folder.note("two", "three")
    assert RunFolder.read(tmp_path / "run").values["notes"] == ["one", "two", "three"]


@pytest.mark.parametrize("left", [["recipe.yaml"], [".recipe.yaml.writing"], ["recipe.yaml", ".run.json.writing"]])
def test_a_run_killed_while_it_was_opened_is_opened_anew(tmp_path: Path, left: list[str]) -> None:
    (tmp_path / "run").mkdir()
    for name in left:
        (tmp_path / "run" / name).write_text("half")
    assert opened(tmp_path / "run", resume=True).values["status"] == "running"
    assert yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["model"]["id"] == "tiny"


def test_a_stage_is_done_when_its_model_stands(tmp_path: Path) -> None:
    folder = opened(tmp_path / "run")
    policy = CausalPolicy(make_model(), make_tokenizer(), "tiny")
    assert folder.stages_done() == -1
    left = tmp_path / "run" / "stages" / "0-sft" / ".model-writing"
    left.mkdir(parents=True)
    (left / "of a killed process").write_text("half")
    assert folder.stages_done() == -1
    folder.save_model(policy, 0)
    assert folder.stages_done() == 0
    assert folder.stage_model(0) == tmp_path / "run" / "stages" / "0-sft" / "model"
    assert {p.name for p in folder.stage(0).iterdir()} == {"model"}
    assert not (folder.stage_model(0) / "of a killed process").exists()
    folder.save_model(policy, 1)
    assert folder.stages_done() == 1
    assert folder.stage_model(1) == folder.model == tmp_path / "run" / "model"


def test_a_failed_save_leaves_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = opened(tmp_path / "run")

    def fail(self: CausalPolicy, where: Path) -> None:
        where.mkdir()
        (where / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(CausalPolicy, "save", fail)
    with pytest.raises(PosttrainError, match=r"cannot save the model to .*model: .*No space left"):
        folder.save_model(CausalPolicy(make_model(), make_tokenizer(), "tiny"), 1)
    assert folder.stages_done() == -1
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["recipe.yaml", "run.json"]


def test_a_broken_state_is_one_line(tmp_path: Path) -> None:
    opened(tmp_path / "run")
    for broken in ("", "[]", "{}", '{"status": "run'):
        (tmp_path / "run" / "run.json").write_text(broken)
        with pytest.raises(
            PosttrainError, match=r"run\.json cannot be read .*restore it, or start the run anew"
        ) as error:
            RunFolder.read(tmp_path / "run")
        assert "\n" not in str(error.value)


def scorer(completion: str, prompt: Any) -> float:
    return 0.0


class Scorer:
    def __call__(self, completion: str, prompt: Any) -> float:
        return 0.0


def test_python_objects_are_named_alike_in_every_process() -> None:
    name = f"{scorer.__module__}:scorer"
    assert plain({"reward": scorer, "path": Path("a/b"), "pair": (1, 2)}) == {
        "reward": name, "path": "a/b", "pair": [1, 2],
    }  # fmt: skip
    assert plain(reward_from(scorer)) == {"scorer": 1.0}
    assert plain(Reward({"mine": (Scorer(), 0.5)})) == {"mine": 0.5}
    assert "0x" not in plain(Scorer())


def test_what_yaml_cannot_hold_is_told() -> None:
    def held(*stages: StageSpec, task: Any = None) -> list[str]:
        return only_in_python(Recipe(ModelSpec(id="tiny"), stages, task))

    assert held(StageSpec(methods.grpo(beta=0.1)), task={"file": "rows.jsonl"}) == []
    assert held(StageSpec(methods.grpo().with_settings(steps=3), reward="math_verify"), task="chain_sum") == []
    task = from_rows([{"prompt": "p", "answer": "a"}], heldout=0)
    assert held(StageSpec(methods.grpo(), reward=scorer), task=task) == ["the task", "the reward of grpo"]
    assert held(StageSpec(methods.grpo().replace(masks=()))) == ["the method grpo, changed"]
    assert held(StageSpec(methods.sft().replace(sampler=methods.dapo().sampler))) == ["the method sft, changed"]
    from dataclasses import replace

    assert held(StageSpec(replace(methods.sft(), name="unheard-of"))) == ["the method unheard-of"]
