"""Stages of a recipe that compress: what they become, and every mistake with its line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain import methods
from posttrain.compress.method import Calibrated, Compression
from posttrain.methods import registry
from posttrain.recipe import Recipe, load_recipe, parse_recipe
from posttrain.recipe_compress import CompressSpec
from posttrain.recipe_text import RecipeError, read_yaml
from posttrain.run_folder import only_in_python, plain

HEAD = "model: m\ntask: t\nstages:\n"


def spec(stage: Any, **values: Any) -> CompressSpec:
    (found,) = parse_recipe({"model": "m", "task": "t", "stages": [stage], **values}).stages
    assert isinstance(found, CompressSpec)
    return found


def mistake(folder: Path, text: str, *overrides: str) -> str:
    file = folder / "recipe.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(file, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message.removeprefix(f"{folder}/")


def test_a_name_alone() -> None:
    found = spec("gptq")
    assert found.method == methods.gptq()
    assert (found.calibration, found.skip) == (None, ())


def test_everything_that_a_stage_can_say(tmp_path: Path) -> None:
    file = tmp_path / "notes.txt"
    file.write_text("text")
    body = {"bits": 3, "group": 64, "act_order": True, "calibration": str(file), "samples": 8, "length": 32,
            "skip": ["*.down_proj"]}  # fmt: skip
    found = spec({"gptq": body})
    assert found.method == methods.gptq(3, 64, act_order=True).replace(calibration=Calibrated(8, 32))
    assert (found.calibration, found.skip) == (str(file), ("*.down_proj",))
    assert spec({"gptq": {"skip": "*.o_proj", "calibration": "task"}}).skip == ("*.o_proj",)
    assert spec({"rtn": {"calibration": ["one text", "another"]}}).calibration == ("one text", "another")


@pytest.mark.parametrize(
    "body", [{"method": "gptq", "bits": 3, "samples": 4}, {"method": "GPTQ", "bits": 3, "samples": 4}]
)
def test_the_other_spelling(body: dict[str, Any]) -> None:
    assert spec({"quantize": body}).method == spec({"gptq": {"bits": 3, "samples": 4}}).method
    assert spec({"quantize": "gptq"}).method == spec({"prune": "gptq"}).method == methods.gptq()


def test_what_a_method_calibrates_on_keeps_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    class Drawn(Calibrated):
        pass

    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    @methods.method(family="quantization")
    def drawing() -> Compression:
        """Draws its own text."""
        return methods.gptq().replace(calibration=Drawn(16, 64))

    assert spec("drawing").method.calibration == Drawn(16, 64)
    changed = spec({"drawing": {"length": 32}}).method.calibration
    assert (type(changed), changed.samples, changed.length) == (Drawn, 16, 32)


def resolved(recipe: Recipe) -> Recipe:
    text = yaml.safe_dump(plain(recipe.resolved()), sort_keys=False)
    return parse_recipe(read_yaml(text, "kept")[0])


def test_resolved_it_is_the_same_and_says_every_default() -> None:
    stages = ["sft", {"gptq": {"bits": 3, "skip": "*.o_proj", "samples": 4}}]
    first = parse_recipe({"model": "m", "task": "t", "stages": stages})
    *_, stage = first.resolved()["stages"]
    assert stage == {"gptq": {"bits": 3, "group": 128, "zero": "integer", "clip": "none", "damping": 0.01,
                              "act_order": False, "calibration": "task", "samples": 4, "length": 512,
                              "skip": ["*.o_proj"]}}  # fmt: skip
    again = resolved(first)
    assert plain(again.resolved()) == plain(first.resolved())
    assert (again.stages[1].method, again.stages[1].skip) == (first.stages[1].method, ("*.o_proj",))  # type: ignore[union-attr]
    assert only_in_python(first) == []


def test_what_looks_at_no_data_needs_none() -> None:
    first = parse_recipe({"model": "m", "stages": [{"rtn": {"bits": 3}}]})
    assert plain(resolved(first).resolved()) == plain(first.resolved())


def test_a_changed_method_is_only_in_python() -> None:
    from dataclasses import replace

    recipe = parse_recipe({"model": "m", "task": "t", "stages": ["gptq"]})
    (stage,) = recipe.stages
    assert isinstance(stage, CompressSpec)
    changed = replace(stage, method=stage.method.replace(skip=("*.o_proj",)))
    assert only_in_python(replace(recipe, stages=(changed,))) == ["the method gptq, changed"]


@pytest.mark.parametrize(
    ("stage", "line", "message"),
    [
        ("gptq: {bit: 4}", 4, "unknown key 'bit'; did you mean bits?"),
        ("gptq: {steps: 4}", 4, "steps is for stages that train, and gptq compresses"),
        (
            "gptq:\n      data: f",
            5,
            "data is for stages that train, and gptq compresses; give its text as calibration: ",
        ),
        ("gptq: {bits: four}", 4, "bits is 'four'; input should be a valid integer"),
        ("gptq: {bits: 9}", 4, "bits is 9; a uniform grid has 1 to 8"),
        ("gptq:\n      bits: 4\n      zero: half", 6, "zero is 'half'; input should be 'none', 'integer' or 'float'"),
        ("gptq: {samples: 0}", 4, "samples is 0; input should be greater than or equal to 1"),
        ("gptq: {length: long}", 4, "length is 'long'; input should be a valid integer"),
        ("gptq: {skip: [1]}", 4, "skip is (1,); input should be a valid string"),
        ("gptq: 4", 4, "gptq is 4; expected settings, as in {bits: 4}"),
        ("gptqq", 4, "unknown method 'gptqq'; did you mean gptq?"),
        ("quantize", 4, "quantize names no method; expected such as quantize: {method: gptq, bits: 4}"),
        ("quantize: {bits: 4}", 4, "quantize names no method; expected such as quantize: {method: gptq, bits: 4}"),
        ("quantize:\n      method: gtpq", 5, "unknown method 'gtpq'; did you mean gptq?"),
        ("quantize: {method: grpo}", 4, "grpo trains; write it as a stage of its own: grpo: ..."),
        (
            "gptq: {calibration: missing.txt}",
            4,
            "no calibration text at missing.txt; expected a file of text or rows",
        ),
        ("gptq: {calibration: missing.jsonl}", 4, "no file missing.jsonl"),
        ("gptq: {calibration: ['', ' ']}", 4, "calibration holds no text; expected a file or texts"),
        (
            "gptq\n  - sft",
            5,
            "sft cannot train what gptq compressed: packed weights take no gradient; put the stages",
        ),
        ("gptq\n  - sft: {}\n  - grpo", 5, "sft cannot train what gptq compressed"),
        (
            "rtn\n  - gptq",
            5,
            "gptq cannot compress what rtn compressed: packed weights are not packed again; give one",
        ),
    ],
)
def test_mistakes(tmp_path: Path, stage: str, line: int, message: str) -> None:
    found = mistake(tmp_path, f"{HEAD}  - {stage}\n")
    assert found.startswith(f"recipe.yaml:{line}: {message}"), found


def test_rows_that_cannot_be_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("{broken\n")
    found = mistake(tmp_path, f"{HEAD}  - gptq:\n      calibration: {file}\n")
    assert found.startswith("recipe.yaml:5: ")
    assert "rows.jsonl" in found


def test_nothing_to_be_calibrated_on(tmp_path: Path) -> None:
    head = "model: m\nstages:\n"
    assert mistake(tmp_path, f"{head}  - gptq\n").startswith(
        "recipe.yaml:3: gptq has nothing to be calibrated on; give a task, or the stage calibration: FILE"
    )
    assert mistake(tmp_path, f"{head}  - rtn: {{calibration: task}}\n").startswith(
        "recipe.yaml:3: calibration is task, but the recipe has no task"
    )


def test_an_override(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{HEAD}  - gptq: {{bits: 4}}\n")
    assert load_recipe(file, ["stages.0.bits=3"]).stages[0].method == methods.gptq(3)
    assert mistake(tmp_path, f"{HEAD}  - gptq\n", "stages.0.bits=x").startswith("stages.0.bits=x: bits is 'x'; input")
