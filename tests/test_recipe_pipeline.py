"""Recipes that name a pipeline of the catalogue: one entry, several stages."""

from __future__ import annotations

from typing import Any, Protocol

import pytest

from posttrain import methods
from posttrain.methods import Method, Pipeline, registry
from posttrain.recipe import Recipe, load_recipe, parse_recipe
from posttrain.recipe_text import RecipeError
from posttrain.run_folder import only_in_python

ROWS = [{"prompt": "p", "completion": "c"}] * 2
PAIRS = [{"prompt": "p", "chosen": "a", "rejected": "b"}] * 2


class Judge(Protocol):
    """What YAML cannot say."""

    def __call__(self) -> float: ...


@pytest.fixture(autouse=True)
def _pipelines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two pipelines, in the catalogue for a test alone; a stage of one differs from the method it is made of."""
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))

    @methods.method(family="hybrid", card="046")
    def cold_start(clip: float = 0.2, judge: Judge | None = None) -> Pipeline:
        """Imitation first."""
        second = methods.grpo(clip).replace(masks=()).with_settings(group=4)
        return methods.sft().with_settings(steps=5) >> second

    @methods.method(family="preference")
    def align() -> Pipeline:
        """Imitation, then preferences."""
        return methods.sft() >> methods.dpo()

    @methods.method(family="hybrid")
    def judged(judge: Judge = float) -> Method:
        """Has an argument that only Python can say."""
        return methods.sft()


def recipe(name: str, body: dict[str, Any] | None = None, **values: Any) -> Recipe:
    return parse_recipe({"model": "m", "stages": [{name: body or {}}], **values})


def test_a_pipeline_becomes_its_stages() -> None:
    found = recipe("cold-start", {"clip": 0.1, "batch": 3}, task="t").stages
    assert [stage.method.name for stage in found] == ["sft", "grpo"]
    first, second = (stage.method for stage in found)
    assert (first.settings.steps, first.settings.batch, second.settings.batch, second.settings.group) == (5, 3, 3, 4)
    assert second.arguments["clip"] == 0.1
    assert second.objective == methods.grpo(0.1).replace(masks=()).objective


def test_resolved_it_is_the_same() -> None:
    body = {"clip": 0.1, "steps": 7, "data": {"source": ROWS, "kind": "demonstrations"}, "reward": "exact_match"}
    first = recipe("cold-start", body, task="t")
    again = parse_recipe(first.resolved())
    for one, other in zip(first.stages, again.stages, strict=True):
        assert (one.method, one.data, one.reward, one.origin) == (other.method, other.data, other.reward, other.origin)
    assert [list(stage) for stage in first.resolved()["stages"]] == [["cold-start"]]
    assert only_in_python(first) == []


def test_a_changed_stage_is_only_in_python() -> None:
    from dataclasses import replace

    first = recipe("cold-start", task="t")
    sft, grpo = first.stages
    changed = replace(first, stages=(sft, replace(grpo, method=grpo.method.replace(critic=True))))
    assert only_in_python(changed) == ["the method grpo, changed"]


def test_an_argument_that_is_an_object_is_only_in_python() -> None:
    from dataclasses import replace

    first = recipe("cold-start", task="t")
    made = methods.find("cold-start").function(judge=float)
    origin = first.stages[0].origin
    assert origin is not None
    told = [
        replace(stage, method=method, origin=replace(origin, arguments={"judge": float}, index=i))
        for i, (stage, method) in enumerate(zip(first.stages, made.stages, strict=True))
    ]
    assert only_in_python(replace(first, stages=tuple(told))) == [
        "the argument judge of sft",
        "the argument judge of grpo",
    ]


def test_rows_and_reward_go_to_the_stages_that_want_them() -> None:
    sft, grpo = recipe("cold-start", {"data": ROWS, "reward": "exact_match"}, task="t").stages
    assert sft.data is not None
    assert (grpo.data, sft.reward, grpo.reward) == (None, None, "exact_match")
    sft, dpo = recipe("align", {"data": {"source": PAIRS, "kind": "preferences"}}, task="t").stages
    assert sft.data is None
    assert dpo.data is not None


def test_without_a_task_rows_are_for_every_stage() -> None:
    rows = [{"prompt": "p", "completion": "c", "answer": "c"}] * 2
    assert all(stage.data is not None for stage in recipe("cold-start", {"data": rows, "reward": "exact_match"}).stages)


@pytest.mark.parametrize(
    ("stage", "said"),
    [
        (
            "align: {reward: exact_match}",
            "recipe.yaml:5: align learns from demonstrations and preferences and takes",
        ),
        ("cold-start: {steps: -1}", "recipe.yaml:5: steps is -1; expected at least 1"),
        ("align: {}", "recipe.yaml:5: dpo learns from preferences; give the stage data: FILE"),
        ("cold-start: {group: 1}\n  - dpo: {}", "recipe.yaml:5: grpo compares completions of a prompt; group is 1"),
        ("cold-start: {}\n  - dpo: {}", "recipe.yaml:6: dpo learns from preferences; give the stage data: FILE"),
        ("judged: {judge: 1}", "recipe.yaml:5: judge is 1; it can only be given in Python"),
        ("cold-start: {judge: 1}", "recipe.yaml:5: judge is 1; "),
    ],
)
def test_mistakes_name_their_line(stage: str, said: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(f"model: m\ntask: t\nseed: 1\nstages:\n  - {stage}\n")
    with pytest.raises(RecipeError) as error:
        load_recipe("recipe.yaml")
    assert str(error.value).startswith(said)
