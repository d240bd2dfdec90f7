"""`posttrain train`: what the options become, and a run from end to end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from commands import call, make_folder, write_rows

from posttrain import methods
from posttrain.methods import registry
from posttrain.methods.registry import Entry
from posttrain.recipe import Recipe
from posttrain.trajectory import PosttrainError

TASK = "{reasoning_gym: chain_sum, terms: [2, 2], digits: [1, 1], train: 12, heldout: 4}"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recipe, dict[str, Any]]]:
    """The recipes that would have been carried out."""
    recipes: list[tuple[Recipe, dict[str, Any]]] = []

    def execute(recipe: Recipe, **options: Any) -> None:
        recipes.append((recipe, options))
        raise PosttrainError("not carried out")

    monkeypatch.setattr("posttrain.run.execute", execute)
    return recipes


def recipe_of(
    capsys: pytest.CaptureFixture[str], executed: list[tuple[Recipe, dict[str, Any]]], *arguments: object
) -> Recipe:
    assert call(capsys, "train", "m", *arguments).error == "error: not carried out"
    return executed[-1][0]


def test_from_end_to_end(capsys: pytest.CaptureFixture[str], tmp_path: Path, tiny: Path) -> None:
    done = call(
        capsys, "train", tiny, "sft", "grpo", "--task", TASK, "--steps", "1", "--batch", "2", "--set", "group=2",
        "--set", "max_tokens=3", "--set", "evaluate.max_tokens=3", "--holdout", "3", "--lora", "2", "--output", "out",
        "--seed", "5",
    )  # fmt: skip
    assert done.code == 0, done.err
    *paths, summary = done.out.splitlines()
    assert paths == ["report: out/report.html", "model: out/model"]
    assert summary.startswith("held-out accuracy: ")
    assert summary.endswith("(n=3)")
    kept = yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())
    assert kept["seed"] == 5
    assert [list(stage) for stage in kept["stages"]] == [["sft"], ["grpo"]]
    assert call(capsys, "run", "--resume", "out").out == done.out


def test_settings_go_to_the_stages_that_know_them(capsys: pytest.CaptureFixture[str], executed: list) -> None:
    recipe = recipe_of(
        capsys, executed, "sft", "grpo", "--task", "chain_sum", "--epochs", "2", "--learning-rate", "1e-5", "--budget",
        "10m", "--set", "clip=0.3", "--set", "stages.1.group=4", "--set", "model.precision=fp32", "--seed", "3",
    )  # fmt: skip
    sft, grpo = (stage.method for stage in recipe.stages)
    assert sft.settings.epochs == grpo.settings.epochs == 2
    assert sft.settings.learning_rate == grpo.settings.learning_rate == 1e-5
    assert sft.settings.budget == grpo.settings.budget == 600
    assert grpo.settings.steps is None  # epochs take the place of the method's own steps
    assert (grpo.arguments["clip"], "clip" in sft.arguments) == (0.3, False)
    assert (sft.settings.group, grpo.settings.group) == (8, 4)
    assert (recipe.model.id, recipe.model.precision, recipe.seed) == ("m", "fp32", 3)


def test_the_command_and_the_folder_are_handed_on(capsys: pytest.CaptureFixture[str], executed: list) -> None:
    recipe_of(capsys, executed, "sft", "--task", "chain_sum", "--output", "out")
    options = executed[-1][1]
    assert options["folder"] == Path("out")
    assert options["command"].split()[0] == "posttrain"


@pytest.mark.parametrize(
    ("given", "task"),
    [
        ("chain_sum", "chain_sum"),
        ("{reasoning_gym: chain_sum, terms: [2, 3]}", {"reasoning_gym": "chain_sum", "terms": [2, 3]}),
        ("reasoning_gym: chain_sum", {"reasoning_gym": "chain_sum"}),
        ("rows.jsonl", "rows.jsonl"),
        ("task.yaml", {"reasoning_gym": "leg_counting", "seed": 4}),
    ],
)
def test_tasks(capsys: pytest.CaptureFixture[str], executed: list, tmp_path: Path, given: str, task: Any) -> None:
    (tmp_path / "task.yaml").write_text("reasoning_gym: leg_counting\nseed: 4\n")
    assert recipe_of(capsys, executed, "sft", "--task", given).task == task


def test_data_goes_to_the_stages_that_learn_from_rows(
    capsys: pytest.CaptureFixture[str], executed: list, tmp_path: Path
) -> None:
    write_rows(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b", "answer": "b"})
    both = recipe_of(capsys, executed, "sft", "grpo", "--task", "chain_sum", "--data", "rows.jsonl")
    assert [stage.data is not None for stage in both.stages] == [True, False]
    alone = recipe_of(capsys, executed, "sft", "grpo", "--data", "rows.jsonl", "--reward", "exact_match")
    assert [stage.data is not None for stage in alone.stages] == [True, True]
    assert [stage.reward for stage in alone.stages] == [None, "exact_match"]
    mixed = recipe_of(capsys, executed, "grpo", "--task", "chain_sum", "--reward", "{exact_match: 1.0, on_error: -1}")
    assert mixed.stages[0].reward == {"exact_match": 1.0, "on_error": -1}


def test_rows_and_reward_of_a_pipeline(
    capsys: pytest.CaptureFixture[str], executed: list, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = Entry("both", "hybrid", None, lambda: methods.sft() >> methods.grpo())
    monkeypatch.setitem(registry._METHODS, "both", entry)
    write_rows(tmp_path / "rows.jsonl", {"prompt": "a", "completion": "b"})
    given = ("--task", "chain_sum", "--data", "rows.jsonl", "--reward", "exact_match", "--steps", "3")
    stages = recipe_of(capsys, executed, "both", *given).stages
    assert [stage.method.name for stage in stages] == ["sft", "grpo"]
    assert [stage.data is not None for stage in stages] == [True, False]
    assert [stage.reward for stage in stages] == [None, "exact_match"]
    assert [stage.method.settings.steps for stage in stages] == [3, 3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sft", "--task", "chain_sum", "--set", "epocs=2"], "unknown setting 'epocs'; did you mean epochs"),
        (["sft", "--task", "chain_sum", "--set", "clip=2"], "unknown setting 'clip'"),
        (["sft", "--task", "chain_sum", "--set", "epochs"], "--set epochs: expected KEY=VALUE, as in group=4"),
        (["sft", "--task", "chain_sum", "--set", "epochs=two"], "--set epochs=two: epochs is 'two'; input should be a"),
        (["sft", "--task", "chain_sum", "--set", "epochs=["], "--set epochs=[:1: broken YAML: "),
        (["sft", "--task", "chain_sum", "--epochs", "2", "--set", "epochs=2"], "--set epochs=2: epochs is given twice"),
        (["sft", "--task", "chain_sum", "--steps", "0"], "--steps 0: steps is 0; expected at least 1"),
        (["sft", "--task", "chain_sum", "--budget", "soon"], "--budget soon: budget is 'soon'; expected a duration"),
        (["sft", "--task", "chain_sum", "--holdout", "0"], "--holdout 0: holdout is 0; input should be greater than"),
        (["sft", "--task", "chain_sum", "--set", "stages.1.steps=1"], "stages.1.steps=1: stages has no 1; expected 0"),
        (["sft", "--task", "chain_sum", "--set", "evaluate.k=[4]"], "evaluate.k=[4]: pass@4 needs samples: 4; got 1"),
        (["sft", "--task", "chain_sum", "--reward", "exact_match"], "--reward: no stage samples completions; give a"),
        (["grpo", "--task", "chain_sum", "--data", "x.jsonl"], "--data: every stage samples completions on the task's"),
        (
            ["grpo", "--task", "chain_sum", "--reward", "exact_mach"],
            "unknown verifier 'exact_mach'; did you mean",
        ),
        (["grpo", "--task", "chain_sum", "--set", "group=1"], "--set group=1: grpo compares completions of a prompt;"),
        (["sfft", "--task", "chain_sum"], "unknown method 'sfft'; did you mean sft?"),
        (["sft", "--task", "chain_sun"], "unknown reasoning-gym task 'chain_sun'; did you mean chain_sum"),
        (["sft", "--task", "{reasoning_gym"], "--task:1: broken YAML: "),
        (["sft", "--task", "absent.yaml"], "--task: cannot read absent.yaml: "),
        (["sft", "--task", "list.yaml"], "list.yaml: got ['x']; expected a mapping such as "),
        (["sft"], "sft has nothing to train on; give a task, or the stage data: FILE"),
        (["dpo", "--data", "absent.jsonl"], "no file absent.jsonl: "),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: list[str], message: str) -> None:
    (tmp_path / "list.yaml").write_text("- x\n")
    done = call(capsys, "train", "m", *arguments)
    assert (done.code, done.out) == (1, "")
    assert len(done.err.splitlines()) == 1
    assert done.error.startswith(f"error: {message}")
    assert [file.name for file in tmp_path.iterdir()] == ["list.yaml"]


def test_what_compresses_is_for_another_command(capsys: pytest.CaptureFixture[str], executed: list) -> None:
    done = call(capsys, "train", "m", "sft", "gptq", "--task", "chain_sum")
    assert done.code == 1
    assert done.error == (
        "error: gptq compresses and does not train; use posttrain quantize, or make it the last stage of a recipe"
    )
    assert not executed
