"""The catalogue is whole: every method is documented, can be built and named, is held to something, and studied."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
from marked import marked, studied

import posttrain
from posttrain import methods
from posttrain.methods.parts import objectives_of, parts_of
from posttrain.methods.registry import Entry
from posttrain.methods.taxonomy import taxonomy
from posttrain.methods.verdicts import verdicts
from posttrain.objective.estimator import Objective
from posttrain.recipe import parse_recipe
from posttrain.recipe_compress import KEYS
from posttrain.training.settings import NAMES

TESTS = Path(__file__).parents[1]
CATALOGUE = methods.registered()
METHODS = pytest.mark.parametrize("entry", CATALOGUE.values(), ids=list(CATALOGUE))

# Methods that no study is about yet. A study that comes takes its method off this list; what is added to the catalogue
# brings its study along.
WITHOUT_STUDY = {
    "apo-down", "apo-zero", "cispo", "dapo", "dpo", "dpo-norm", "dr-grpo", "gdpo", "grpo", "gspo", "hinge-dpo",
    "ipo", "kto", "orpo", "ppo", "reinforce", "reinforce++", "rloo", "robust-dpo", "sft", "simpo",
}  # fmt: skip


# -- documentation ---------------------------------------------------------------------------------------------------


def documentation(entry: Entry) -> str:
    return inspect.getdoc(entry.function) or ""


@METHODS
def test_says_what_it_is_and_gives_its_equation(entry: Entry) -> None:
    first, blank, *_ = f"{documentation(entry)}\n".split("\n")
    assert first.endswith("."), "the first line is the summary in lists: one sentence"
    assert not blank
    assert re.search(r"^\.\. math:: *\S", documentation(entry), re.MULTILINE)


@METHODS
def test_names_its_source(entry: Entry) -> None:
    found = re.search(r"Reference:(.*)", documentation(entry), re.DOTALL)
    assert found
    text = " ".join(found[1].split())
    assert re.search(r"\b(19|20)\d\d\b", text), "a reference has a year"
    cited = re.match(r"[A-Z]\w+(,| and | et al)", text) and len(text.split()) > 8
    assert re.search(r"arXiv \d{4}\.\d{4,5}\b", text) or cited, "an arXiv id, or author, title and year"
    for card in entry.cards:
        assert re.search(rf"\bcards? [\d, and]*\b{card}\b", text), f"the reference does not name card {card}"


@METHODS
def test_explains_every_argument(entry: Entry) -> None:
    section = re.search(r"^Args:\n((?:[ ]+\S.*\n?)+)", documentation(entry), re.MULTILINE)
    told = section[1] if section else ""
    for name in entry.parameters:
        assert re.search(rf"(^|[.;,]|\n)\s*{name}(, \w+)*:", told), f"Args: does not explain {name}"


# -- what it is made of ----------------------------------------------------------------------------------------------


@METHODS
def test_an_argument_named_like_a_setting_is_that_setting(entry: Entry) -> None:
    # in a recipe arguments and settings stand side by side
    if entry.kind == "compression":
        assert not entry.parameters.keys() & {*KEYS, "method"}, "those are what a stage of a recipe says of calibration"
        return
    for name in entry.parameters.keys() & set(NAMES):
        assert {getattr(stage.settings, name) for stage in entry.stages} == {entry.parameters[name]}


@METHODS
def test_builds_with_its_defaults(entry: Entry) -> None:
    missing = [name for name, default in entry.parameters.items() if default is inspect.Parameter.empty]
    assert not missing
    for stage in entry.stages:
        assert isinstance(stage, methods.Method)
        assert stage.objective.needs is not None
    assert bool(entry.stages) == (entry.kind != "compression")
    if entry.kind != "pipeline":
        made = entry.function()
        assert isinstance(made, methods.Compression if entry.kind == "compression" else methods.Method)
        assert made.name == entry.name
        assert made.arguments == entry.parameters


@METHODS
def test_has_a_place(entry: Entry) -> None:
    for card in entry.cards:
        assert re.fullmatch(r"\d{3}", card)
        assert card == "000" or taxonomy().of_card(card) is not None, f"there is no card {card}"
    assert entry.family in taxonomy().home, f"families are those of taxonomy.yaml; got {entry.family}"
    branch = taxonomy().branches[entry.branch or ""]
    assert taxonomy().holds(branch)
    assert entry.family in branch.families


@METHODS
def test_can_be_imported(entry: Entry) -> None:
    name = inspect.unwrap(entry.function).__name__
    assert getattr(methods, name) is entry.function
    assert name in methods.__all__


ROWS: dict[str, Any] = {
    "demonstrations": {"prompt": "1+1", "completion": "2"},
    "preferences": {"prompt": "1+1", "chosen": "2", "rejected": "3"},
    "feedback": {"prompt": "1+1", "completion": "2", "label": True},
}


@METHODS
def test_resolves_by_name_and_in_a_recipe(entry: Entry) -> None:
    assert methods.find(entry.name.upper().replace("-", "_")) == entry
    kinds = {stage.data for stage in entry.stages} & ROWS.keys()
    data = {"data": [ROWS[kind] for kind in kinds] * 2} if kinds else {}
    values: dict[str, Any] = {"model": "smollm2-135m", "stages": [{entry.name: data}]}
    if entry.kind != "offline":  # a compression is calibrated on the task
        values["task"] = {"reasoning_gym": "chain_sum", "solution": "steps"}
    recipe = parse_recipe(values)
    made = entry.function()
    wanted_stages = (made,) if entry.kind == "compression" else entry.stages
    for stage, wanted in zip(recipe.stages, wanted_stages, strict=True):
        assert stage.method.name == wanted.name
        assert parts_of(stage.method) == parts_of(wanted)


# -- exact checks and studies ----------------------------------------------------------------------------------------

LIMITS, GRADIENTS = marked(TESTS, "limit"), marked(TESTS, "gradient")
STUDIED = studied(Path(posttrain.__file__).parent / "studies")


@METHODS
def test_is_held_to_something_known(entry: Entry) -> None:
    assert entry.name in LIMITS, f'no test is marked @pytest.mark.limit("{entry.name}")'


def shape(objective: Objective) -> tuple[object, ...]:
    """Which kinds of parts an objective has; with other numbers in them it is no new one."""
    return tuple((type(part), type(getattr(part, "loss", None))) for part in objective.parts)


@METHODS
def test_its_gradient_is_held_to_the_papers_loss_where_its_objective_is_new(entry: Entry) -> None:
    if entry.name in GRADIENTS:
        return
    known = {shape(o) for name in GRADIENTS if name in CATALOGUE for o in objectives_of(CATALOGUE[name].function())}
    new = [o for o in objectives_of(entry.function()) if shape(o) not in known]
    assert not new, f'its objective is new; no test is marked @pytest.mark.gradient("{entry.name}")'


@METHODS
def test_is_studied(entry: Entry) -> None:
    assert (entry.name in STUDIED) != (entry.name in WITHOUT_STUDY), (
        f"take {entry.name} off WITHOUT_STUDY: {STUDIED[entry.name]} studies it"
        if entry.name in STUDIED
        else f'no study of {entry.name}: expected @study(method="{entry.name}", ...) in posttrain/studies'
    )


def test_the_list_of_methods_without_study_names_methods() -> None:
    assert set(CATALOGUE) >= WITHOUT_STUDY


def test_marks_name_methods() -> None:
    for found in (LIMITS, GRADIENTS):
        assert not {name: tests for name, tests in found.items() if name not in CATALOGUE}


def test_every_verdict_is_that_of_a_study_that_is_there() -> None:
    told = {name for verdict in verdicts() for name in verdict.methods}
    assert told <= set(STUDIED)
