"""Recipes: every mistake is one line that names its line; overrides; the resolved recipe runs the same."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from posttrain import methods
from posttrain.evaluation.tasks import task_from
from posttrain.methods.parts import parts_of
from posttrain.recipe import Recipe, StageSpec, load_recipe, parse_recipe
from posttrain.recipe_compress import CompressSpec
from posttrain.recipe_text import RecipeError, Where, override, read_yaml
from posttrain.recipe_values import seconds
from posttrain.run_folder import only_in_python, plain
from posttrain.training.settings import NAMES

GOOD = """\
model: tiny
task:
  reasoning_gym: chain_sum
  terms: [2, 2]
stages:
  - sft: {epochs: 1, rows: 8}
  - grpo:
      steps: 2
      group: 4
evaluate:
  samples: 2
  holdout: 4
seed: 7
output: runs/one
"""


def written(folder: Path, text: str) -> Path:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    return file


def mistake(folder: Path, text: str, *overrides: str) -> str:
    """The message of a recipe's mistake, without the folder in front."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(written(folder, text), overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{folder}/")


def test_good_recipe(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, GOOD))
    assert recipe.model.id == "tiny"
    assert [s.method.name for s in recipe.stages] == ["sft", "grpo"]
    assert recipe.stages[0].method.settings.rows == 8
    assert recipe.stages[1].method.settings.group == 4
    assert (recipe.evaluate.samples, recipe.evaluate.holdout, recipe.seed) == (2, 4, 7)
    assert recipe.output == Path("runs/one")
    assert recipe.task == {"reasoning_gym": "chain_sum", "terms": [2, 2]}


def test_short_forms(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, "model: m\ntask: chain_sum\nstages: [sft, grpo: , Dr_GRPO: {}]\n"))
    assert [s.method.name for s in recipe.stages] == ["sft", "grpo", "dr-grpo"]
    assert recipe.stages[1].method == methods.grpo()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("model: tiny", "modle: tiny", "recipe.yaml:1: unknown key 'modle'; did you mean model?"),
        ("model: tiny\n", "", "recipe.yaml:1: model is missing; expected a bundled name, folder, GGUF file or hub id"),
        ("model: tiny", "model: 5", "recipe.yaml:1: model is 5; expected a mapping with id, precision"),
        ("model: tiny", "model: {id: 5}", "recipe.yaml:1: id is 5; input should be a valid string"),
        ("model: tiny", "model: {precision: fp32}", "recipe.yaml:1: id is missing in model"),
        ("model: tiny", "model: {id: tiny, precision: fp8}", "recipe.yaml:1: precision is 'fp8'; input should be"),
        ("model: tiny", "model: {id: tiny, device: gpu}", "recipe.yaml:1: device is 'gpu'; expected such as cpu"),
        ("model: tiny", "model: {id: tiny, device: 'cuda:99'}", "recipe.yaml:1: device is 'cuda:99'; this machine has"),
        ("stages:", "stages: []\nnone:", "recipe.yaml:6: unknown key 'none'"),
        ("  - sft:", "  - sfft:", "recipe.yaml:6: unknown method 'sfft'; did you mean sft?"),
        ("  - sft: {", "  - sft: {epocs: 1, ", "recipe.yaml:6: unknown key 'epocs'; did you mean epochs?"),
        ("epochs: 1", "epochs: many", "recipe.yaml:6: epochs is 'many'; input should be a valid number"),
        ("epochs: 1", "epochs: true", "recipe.yaml:6: epochs is True; input should be a valid number"),
        ("epochs: 1", "epochs: '1'", "recipe.yaml:6: epochs is '1'; input should be a valid number"),
        ("epochs: 1", "betas: [0.9]", "recipe.yaml:6: betas is (0.9,); "),
        ("epochs: 1", "schedule: square", "recipe.yaml:6: schedule is 'square'; input should be 'constant', 'linear'"),
        ("epochs: 1", "reward: exact_match", "recipe.yaml:6: sft learns from demonstrations and takes no reward"),
        ("epochs: 1", "data: 5", "recipe.yaml:6: source is 5; input should be a valid string"),
        ("epochs: 1", "data: {sauce: x}", "recipe.yaml:6: unknown key 'sauce'; did you mean source?"),
        ("epochs: 1", "data: {kind: prompts}", "recipe.yaml:6: source is missing in data"),
        ("epochs: 1", "data: {source: x, max_length: 0}", "recipe.yaml:6: max_length is 0; input should be greater"),
        ("epochs: 1", "data: {source: x, kind: prompts}", "recipe.yaml:6: sft learns from demonstrations; kind is"),
        ("epochs: 1", "data: nowhere.jsonl", "recipe.yaml:6: no file nowhere.jsonl: "),
        ("  - grpo:", "  - grpo: 5\n  - grpo:", "recipe.yaml:7: grpo is 5; expected settings, as in {steps: 60}"),
        ("  - grpo:", "  - ppo: {}\n    grpo:", "recipe.yaml:7: got ppo, grpo; expected one method with its settings"),
        ("  - grpo:", "  - 5\n  - grpo:", "recipe.yaml:7: got 5; expected one method with its settings"),
        ("steps: 2", "steps: 2.5", "recipe.yaml:8: steps is 2.5; input should be a valid integer"),
        ("steps: 2", "steps: 0", "recipe.yaml:8: steps is 0; expected at least 1"),
        ("steps: 2", "clip: wide", "recipe.yaml:8: clip is 'wide'; input should be a valid number"),
        ("steps: 2", "budget: soon", "recipe.yaml:8: budget is 'soon'; expected a duration such as 90s, 10m or 1h"),
        ("steps: 2", "budget: 0s", "recipe.yaml:8: budget is 0; expected more (nothing would be trained)"),
        ("epochs: 1", "epochs: 0", "recipe.yaml:6: epochs is 0; expected more (nothing would be trained)"),
        ("steps: 2", "warmup: 2", "recipe.yaml:8: warmup is 2.0; expected a share of the steps between 0 and 1"),
        ("steps: 2", "top_p: 3", "recipe.yaml:8: sampling: top_p is 3.0; expected a number from 0 to 1"),
        ("steps: 2", "reward: exact_mach", "recipe.yaml:8: unknown verifier 'exact_mach'; did you mean exact_match"),
        ("steps: 2", "steps: 2\n      steps: 3", "recipe.yaml:9: steps is given twice"),
        ("group: 4", "group: 1", "recipe.yaml:9: grpo compares completions of a prompt; group is 1, expected"),
        ("  - grpo:", "  - reinforce: {baseline: mean}\n  - grpo:", "recipe.yaml:7: baseline is 'mean'; expected"),
        ("  samples: 2", "  samples: 0", "recipe.yaml:11: samples is 0; input should be greater than or equal to 1"),
        ("  samples: 2", "  samples: 2\n  k: [1, 4]", "recipe.yaml:12: pass@4 needs samples: 4; got 2"),
        ("  samples: 2", "  k: [1, x]", "recipe.yaml:11: k.1 is 'x'; input should be a valid integer"),
        ("  samples: 2", "  samples: 2\n  temperature: 0", "recipe.yaml:12: 2 samples at temperature 0 are all the"),
        ("  samples: 2", "  before: perhaps", "recipe.yaml:11: before is 'perhaps'; input should be a valid boolean"),
        ("  holdout: 4", "  hold_out: 4", "recipe.yaml:12: unknown key 'hold_out'; did you mean holdout?"),
        ("  samples: 2\n  holdout: 4", "  - 5", "recipe.yaml:10: evaluate is [5]; expected a mapping with samples"),
        ("seed: 7", "seed: -1", "recipe.yaml:13: seed is -1; expected a whole number from 0 to 4294967295"),
        ("seed: 7", "seed: true", "recipe.yaml:13: seed is True; expected a whole number"),
        ("seed: 7", "seed: 1.5", "recipe.yaml:13: seed is 1.5; expected a whole number"),
        ("output: runs/one", "output: 5", "recipe.yaml:14: output is 5; expected a folder"),
        ("output: runs/one", "output: [", "recipe.yaml:15: broken YAML: expected the node content"),
        ("seed: 7", "seed: 7\n\tx: 1", "recipe.yaml:14: broken YAML: found character '\\t'"),
        ("seed: 7", "seed: 2026-13-01", "recipe.yaml: broken YAML: month must be in 1..12"),
        ("seed: 7", "? [a, b]\n: 5", "recipe.yaml:13: broken YAML: found unhashable key"),
        ("seed: 7", "seed: &a [*a]", "recipe.yaml: broken YAML: nested too deeply, or an anchor inside itself"),
    ],
)  # fmt: skip
def test_mistakes_name_their_line(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert GOOD.count(old) == 1
    assert mistake(tmp_path, GOOD.replace(old, new)).startswith(message)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe.yaml: got NoneType; expected a mapping with model, task and stages"),
        ("- model", "recipe.yaml:1: got list; expected a mapping"),
        ("model: m\nstages: []", "recipe.yaml:2: stages is []; expected a list such as"),
        ("model: m\nstages: sft", "recipe.yaml:2: stages is 'sft'; expected a list such as"),
        ("model: m\ntask: chain_sum", "recipe.yaml:1: stages is missing"),
        ("model: m\nstages:\n  - sft", "recipe.yaml:3: sft has nothing to train on; give a task, or the stage data"),
        (
            "model: m\ntask: x\nstages:\n  - dpo",
            "recipe.yaml:4: dpo learns from preferences; give the stage data: FILE",
        ),
        ("model: m\ntask: x\nstages: [kto: {}]", "recipe.yaml:3: kto learns from feedback; give the stage data: FILE"),
        ("model: m\ntask: [x]\nstages: [sft]", "recipe.yaml:2: task is ['x']; expected a name, a file or a mapping"),
        (
            "model: m\nstages:\n  - grpo:\n      data: {source: [{prompt: p}]}",
            "recipe.yaml:3: grpo needs a reward; give a task, or the stage reward: NAME",
        ),
    ],
)
def test_missing_parts(tmp_path: Path, text: str, message: str) -> None:
    assert mistake(tmp_path, text).startswith(message)


@pytest.mark.parametrize("method", ["grpo", "dr-grpo", "dapo", "rloo", "gspo", "cispo", "gdpo"])
def test_group_of_one_is_refused_where_completions_are_compared(method: str) -> None:
    with pytest.raises(RecipeError, match="group is 1, expected 2 or more"):
        parse_recipe({"model": "m", "task": "t", "stages": [{method: {"group": 1}}]})


@pytest.mark.parametrize("stage", [{"ppo": {"group": 1}}, {"reinforce": {"group": 1}}, {"sft": {"group": 1}}])
def test_group_of_one_is_fine_elsewhere(stage: dict) -> None:
    assert parse_recipe({"model": "m", "task": "t", "stages": [stage]}).stages[0].method.settings.group == 1


def test_reinforce_with_group_baseline_compares() -> None:
    with pytest.raises(RecipeError, match="group is 1"):
        parse_recipe({"model": "m", "task": "t", "stages": [{"reinforce": {"group": 1, "baseline": "group"}}]})


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no recipe at .*absent\.yaml: expected a YAML file"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match="cannot read"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot read"):
        load_recipe(tmp_path / "binary.yaml")


def test_the_first_row_of_a_file_is_read(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    text = f"model: m\nstages:\n  - dpo:\n      data: {rows}\n"
    rows.write_text('{"prompt": "p", "chosen": "good"}\n')
    assert mistake(tmp_path, text).startswith("recipe.yaml:4: rows.jsonl:1: missing column: ")
    rows.write_text("{broken\n")
    assert mistake(tmp_path, text).startswith("recipe.yaml:4: rows.jsonl:1: broken JSON: ")
    rows.write_text("")
    assert "holds no rows" in mistake(tmp_path, text)
    rows.write_text('{"prompt": "p", "chosen": "good", "rejected": "bad"}\n')
    load_recipe(written(tmp_path, text))


def test_a_bad_first_row_may_be_skipped(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{broken\n")
    load_recipe(written(tmp_path, f"model: m\nstages: [sft: {{data: {{source: {rows}, on_bad: skip}}}}]\n"))


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("{reasoning_gym: chain_sum, terms: 2}", "recipe.yaml:2: reasoning_gym chain_sum: terms is 2; expected a pair"),
        ("chain_sun", "recipe.yaml:2: unknown reasoning-gym task 'chain_sun'; did you mean chain_sum"),
        ("\n  reasoning_gym: chain_sum\n  train: few", "recipe.yaml:4: task: train is 'few'; expected a whole number"),
    ],
)
def test_a_mistake_in_the_task_names_its_line(tmp_path: Path, task: str, message: str) -> None:
    recipe = load_recipe(written(tmp_path, f"model: m\ntask: {task}\nstages: [sft]\n"))
    with pytest.raises(RecipeError) as caught:
        recipe.built_task()
    assert str(caught.value).removeprefix(f"{tmp_path}/").startswith(message)


def test_no_task_is_no_task() -> None:
    recipe = parse_recipe({"model": "m", "stages": [{"sft": {"data": [{"prompt": "a", "completion": "b"}]}}]})
    assert recipe.built_task() is None


# Numbers and durations


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "0.00001", ".1e-4", "+1e-05"])
def test_scientific_notation_is_a_number(text: str) -> None:
    assert read_yaml(f"x: {text}", "file")[0] == {"x": 1e-5}


@pytest.mark.parametrize("text", ["1e", "e5", "1e5x", "1e-5-6", "'1e-5'", "v1e5"])
def test_what_only_looks_scientific_is_text(text: str) -> None:
    assert isinstance(read_yaml(f"x: {text}", "file")[0]["x"], str)


@given(st.floats(allow_nan=False, allow_infinity=False))
@hypothesis_settings(deadline=None)
def test_every_float_is_read_as_python_writes_it(value: float) -> None:
    assert read_yaml(f"x: {value!r}", "file")[0] == {"x": value}


@pytest.mark.parametrize(
    ("given_", "expected"),
    [(90, 90.0), (1.5, 1.5), ("90", 90.0), ("90s", 90.0), ("10m", 600.0), ("1.5h", 5400.0), ("2 m", 120), (".5m", 30)],
)  # fmt: skip
def test_durations(given_: object, expected: float) -> None:
    assert seconds(given_) == expected


@pytest.mark.parametrize("wrong", ["", "m", "1.2.3", "10 minutes", "-5m", "1d", None, True, [], "1h30m", "."])
def test_no_durations(wrong: object) -> None:
    with pytest.raises(RecipeError, match="expected a duration such as 90s, 10m or 1h"):
        seconds(wrong)


def test_a_budget_of_a_stage() -> None:
    values = {"model": "m", "task": "t", "stages": [{"grpo": {"budget": "10m"}}, {"sft": {"budget": None}}]}
    stages = parse_recipe(values).stages
    assert [s.method.settings.budget for s in stages] == [600.0, None]


def test_epochs_take_the_place_of_a_methods_own_steps() -> None:
    values = {"model": "m", "task": "t", "stages": [{"grpo": {"epochs": 2}}, {"grpo": {"epochs": 2, "steps": 5}}]}
    stages = parse_recipe(values).stages
    assert [s.method.settings.total_steps(80) for s in stages] == [20, 5]


# Overrides


def overridden(*assignments: str, text: str = GOOD) -> Recipe:
    values, lines = read_yaml(text, "recipe.yaml")
    return parse_recipe(*override(values, assignments, Where("recipe.yaml", lines)))


def test_overrides() -> None:
    recipe = overridden(
        "stages.0.epochs=3", "stages.1.grpo.group=2", "stages.1.learning_rate=1e-5", "evaluate.holdout=50", "seed=9",
        "task.terms=[3, 3]", "model.precision=fp32", "stages.0.data=[{prompt: a, completion: b}]",
        "stages.0.data.0.prompt=c",
    )  # fmt: skip
    assert recipe.stages[0].method.settings.epochs == 3
    assert recipe.stages[1].method.settings.group == 2
    assert recipe.stages[1].method.settings.learning_rate == 1e-5
    assert (recipe.evaluate.holdout, recipe.seed) == (50, 9)
    assert recipe.task == {"reasoning_gym": "chain_sum", "terms": [3, 3]}
    assert (recipe.model.id, recipe.model.precision) == ("tiny", "fp32")
    assert recipe.stages[0].data is not None
    assert recipe.stages[0].data.source == [{"prompt": "c", "completion": "b"}]


def test_overrides_open_what_is_written_short() -> None:
    text = "model: m\ntask: t\nstages: [sft, grpo: , dpo: {data: {source: [{prompt: a, chosen: b, rejected: c}]}}]\n"
    recipe = overridden(
        "stages.0.epochs=3", "stages.1.group=2", "stages.2.data.chat=false", "evaluate.k=[1]", text=text
    )
    assert recipe.stages[0].method.settings.epochs == 3
    assert recipe.stages[1].method.settings.group == 2
    assert recipe.stages[2].data is not None
    assert not recipe.stages[2].data.chat


def test_overrides_leave_the_file_alone() -> None:
    values, lines = read_yaml(GOOD, "recipe.yaml")
    override(values, ["stages.0.epochs=3", "seed=1"], Where("recipe.yaml", lines))
    assert values == read_yaml(GOOD, "recipe.yaml")[0]


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("stages.0.epochs=x", "stages.0.epochs=x: epochs is 'x'; input should be a valid number"),
        ("stages.0.epocs=1", "stages.0.epocs=1: unknown key 'epocs'; did you mean epochs?"),
        ("stages.2.epochs=1", "stages.2.epochs=1: stages has no 2; expected 0 to 1"),
        ("stages.sft.epochs=1", "stages.sft.epochs=1: stages has no sft; expected 0 to 1"),
        ("seed.x=1", "seed.x=1: seed is 7 and has no x"),
        ("seed", "seed: expected KEY=VALUE, as in stages.0.epochs=3"),
        ("=1", "=1: expected KEY=VALUE"),
        ("stages..epochs=1", "stages..epochs=1: expected KEY=VALUE"),
        ("seed=-1", "seed=-1: seed is -1; expected a whole number"),
        ("sed=1", "sed=1: unknown key 'sed'; did you mean seed?"),
        ("seed=[", "seed=[:1: broken YAML"),
        ("stages.1={grpo: {grup: 2}}", "stages.1={grpo: {grup: 2}}: unknown key 'grup'; did you mean group?"),
    ],
)
def test_a_wrong_override_names_itself(assignment: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        overridden(assignment)
    assert str(caught.value).startswith(message)


def test_a_mistake_of_the_file_keeps_its_line_beside_overrides() -> None:
    with pytest.raises(RecipeError, match=r"^recipe.yaml:9: group is 0"):
        overridden("stages.1.steps=3", text=GOOD.replace("group: 4", "group: 0"))


# The resolved recipe


def roundtrip(recipe: Recipe) -> None:
    """What a run folder keeps of a recipe is a recipe, and keeps the same."""
    kept = plain(recipe.resolved())
    text = yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)
    again = parse_recipe(read_yaml(text, "kept")[0])
    assert plain(again.resolved()) == kept
    for one, other in zip(again.stages, recipe.stages, strict=True):
        if isinstance(other, CompressSpec):
            assert isinstance(one, CompressSpec)
            assert replace(one, given={}) == replace(other, given={})
            continue
        assert isinstance(one, StageSpec)
        assert (one.method.name, one.method.data, one.method.settings) == (
            other.method.name, other.method.data, other.method.settings,
        )  # fmt: skip
        assert one.method.arguments == other.method.arguments
        assert parts_of(one.method) == parts_of(other.method)
    assert (again.model, again.evaluate, again.seed, again.task) == (
        recipe.model, recipe.evaluate, recipe.seed, plain(recipe.task),
    )  # fmt: skip
    assert [getattr(s, "data", None) for s in again.stages] == [getattr(s, "data", None) for s in recipe.stages]


DATA = {
    "preferences": [{"prompt": "p", "chosen": "a", "rejected": "b"}],
    "feedback": [{"prompt": "p", "completion": "a", "label": True}],
}


@pytest.mark.parametrize("name", methods.registered())
def test_every_method_with_its_defaults_resolves_to_itself(name: str) -> None:
    needs = {stage.data for stage in methods.find(name).stages} & DATA.keys()
    rows = [{"source": DATA[kind], "kind": kind} for kind in needs]
    recipe = parse_recipe({"model": "m", "task": "t", "stages": [{name: {"data": rows[0]} if rows else {}}]})
    roundtrip(recipe)
    assert only_in_python(recipe) == []


@pytest.mark.parametrize(
    "stage",
    [
        {"grpo": {"epochs": 2}},
        {"grpo": {"steps": None}},
        {"sft": {"steps": 3, "betas": [0.8, 0.9], "lora": 4, "schedule": "cosine"}},
        {"ppo": {"updates": 2}},
        {"gdpo": {"weights": {"a": 1, "b": 0.5}}},
        {"grpo": {"budget": "10m", "reward": {"exact_match": 1.0, "on_error": -1}}},
        {"sft": {"data": {"source": [{"q": "a", "completion": "b"}], "columns": {"q": "prompt"}, "heldout": 0.5}}},
    ],
)
def test_settings_resolve_to_themselves(stage: dict) -> None:
    roundtrip(parse_recipe({"model": {"id": "m", "precision": "fp32"}, "task": "t", "stages": [stage], "seed": 3}))


def test_resolved_writes_every_default() -> None:
    (stage,) = parse_recipe({"model": "m", "task": "t", "stages": ["grpo"]}).resolved()["stages"]
    assert set(NAMES) <= set(stage["grpo"])
    assert stage["grpo"]["clip"] == 0.2


def test_resolved_is_plain_data(tmp_path: Path) -> None:
    resolved = load_recipe(written(tmp_path, GOOD)).resolved()
    assert json.loads(json.dumps(resolved)) == resolved


def test_a_task_made_in_python_is_taken_as_it_is() -> None:
    task = task_from({"reasoning_gym": "chain_sum", "train": 4, "heldout": 2})
    recipe = parse_recipe({"model": "m", "task": task, "stages": ["sft"]})
    assert recipe.built_task() is task
