"""Recipes: YAML to stages, everything checked before anything loads.

Every mistake (unknown key or method, wrong type, missing part) is one line that names the line of the file.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from posttrain.methods.registry import Entry, find
from posttrain.train.method import Method
from posttrain.train.settings import NAMES, Settings
from posttrain.trajectory import PosttrainError

Place = tuple[str | int, ...]  # path of keys and indices inside a recipe


class RecipeError(PosttrainError):
    """A mistake in a recipe; the message starts with `file:line`."""


class ModelSpec(BaseModel):
    """model: where it comes from and how it is computed (see `load`)."""

    model_config = ConfigDict(extra="forbid")
    id: str
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    device: str | None = None
    trust_remote_code: bool = False
    revision: str | None = None


class DataSpec(BaseModel):
    """data: rows of a stage's own (see `load_dataset`); `heldout` keeps a share or a number of rows for evaluation."""

    model_config = ConfigDict(extra="forbid")
    source: str | list[dict[str, Any]]
    kind: Literal["demonstrations", "preferences", "feedback", "prompts"] | None = None
    columns: dict[str, str] = {}
    system: str | None = None
    chat: bool = True
    max_length: int | None = None
    on_bad: Literal["stop", "skip"] = "stop"
    split: str = "train"
    heldout: float = 0.0


class EvaluateSpec(BaseModel):
    """evaluate: `samples` completions on `holdout` held-out prompts before and after (greedy with one sample)."""

    model_config = ConfigDict(extra="forbid")
    samples: int = 1
    holdout: int | None = None
    max_tokens: int = 128
    temperature: float | None = None
    k: list[int] = [1]
    before: bool = True


@dataclass(frozen=True)
class StageSpec:
    """A stage: the method with its settings, and data or reward of its own. `given`: what the recipe wrote."""

    method: Method
    data: DataSpec | None = None
    reward: Any = None
    given: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. task: the mapping that `task_from` takes, or a `Task`; output: the run folder."""

    model: ModelSpec
    stages: tuple[StageSpec, ...]
    task: Any = None
    evaluate: EvaluateSpec = field(default_factory=EvaluateSpec)
    seed: int = 0
    output: Path | None = None

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default written out; as YAML it runs the same."""
        stages = []
        for stage in self.stages:
            body: dict[str, Any] = {k: v for k, v in stage.method.arguments.items() if v is not None}
            body |= {k: list(v) if isinstance(v, tuple) else v for k, v in stage.method.settings.as_dict().items()}
            body = {k: v for k, v in body.items() if v is not None}
            if stage.data is not None:
                body["data"] = stage.data.model_dump(exclude_none=True)
            if stage.reward is not None:
                body["reward"] = stage.reward
            stages.append({stage.method.name: body})
        found: dict[str, Any] = {"model": self.model.model_dump(exclude_none=True)}
        if self.task is not None:
            found["task"] = self.task if isinstance(self.task, str | Mapping) else getattr(self.task, "name", "task")
        return found | {
            "stages": stages,
            "evaluate": self.evaluate.model_dump(exclude_none=True),
            "seed": self.seed,
        }


KEYS = ("model", "task", "stages", "evaluate", "seed", "output")
STAGE_KEYS = ("data", "reward")


def load_recipe(path: str | Path) -> Recipe:
    """Read and check a recipe file."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}: expected a YAML file with model, task and stages") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read {path}: {error}") from error
    values, lines = read_yaml(text, str(path))
    return parse_recipe(values, Where(str(path), lines))


@dataclass(frozen=True)
class Where:
    """Turns a place inside a recipe into `file:line`."""

    name: str = "recipe"
    lines: Mapping[Place, int] = field(default_factory=dict)

    def error(self, place: Place, message: str) -> RecipeError:
        line = next((self.lines[place[:n]] for n in range(len(place), -1, -1) if place[:n] in self.lines), None)
        return RecipeError(f"{self.name}:{line}: {message}" if line is not None else f"{self.name}: {message}")


def read_yaml(text: str, name: str) -> tuple[Any, dict[Place, int]]:
    """The values of a YAML text, and the line (from 1) of every key and item."""
    lines: dict[Place, int] = {}

    def walk(node: yaml.Node, place: Place) -> None:
        lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                inner = (*place, str(key.value))
                lines[inner] = key.start_mark.line + 1
                if key.value in seen:
                    raise RecipeError(f"{name}:{lines[inner]}: {key.value} is given twice")
                seen.add(key.value)
                walk(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                walk(item, (*place, i))

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            walk(root, ())
        return yaml.safe_load(text), lines
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{name}:{line}: broken YAML: {error.problem}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{name}: broken YAML: {error}") from error


def parse_recipe(values: Any, where: Where | None = None) -> Recipe:
    """Check a recipe given as nested mappings."""
    where = where or Where()
    if not isinstance(values, Mapping):
        raise where.error((), f"got {type(values).__name__}; expected a mapping with model, task and stages")
    _known(values, KEYS, (), where)
    if "model" not in values:
        raise where.error((), "model is missing; expected a bundled name, folder, GGUF file or hub id")
    model = values["model"]
    spec = _checked(ModelSpec, {"id": model} if isinstance(model, str) else model, ("model",), where)
    stages = values.get("stages")
    if not isinstance(stages, Sequence) or isinstance(stages, str) or not stages:
        raise where.error(("stages",), f"stages is {stages!r}; expected a list such as [sft: {{epochs: 1}}]")
    parsed = tuple(_stage(stage, ("stages", i), where) for i, stage in enumerate(stages))
    seed, output = values.get("seed", 0), values.get("output")
    if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
        raise where.error(("seed",), f"seed is {seed!r}; expected a whole number from 0")
    evaluate = _checked(EvaluateSpec, values.get("evaluate") or {}, ("evaluate",), where)
    recipe = Recipe(spec, parsed, values.get("task"), evaluate, seed, Path(output) if output else None)
    check(recipe, where)
    return recipe


def check(recipe: Recipe, where: Where | None = None) -> None:
    """What only shows when the parts are seen together: every stage has something to train on."""
    where = where or Where()
    for i, stage in enumerate(recipe.stages):
        name, needs = stage.method.name, stage.method.data
        if stage.data is None and needs in ("preferences", "feedback"):
            raise where.error(("stages", i), f"{name} learns from {needs}; give the stage data: FILE")
        if stage.data is None and recipe.task is None:
            raise where.error(("stages", i), f"{name} has nothing to train on; give a task, or the stage data: FILE")
        if needs == "prompts" and stage.reward is None and recipe.task is None:
            raise where.error(("stages", i), f"{name} needs a reward; give a task, or the stage reward: NAME")


def _stage(value: Any, place: Place, where: Where) -> StageSpec:
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, Mapping) or len(value) != 1:
        raise where.error(place, f"got {value!r}; expected one method with its settings, as in grpo: {{steps: 60}}")
    ((name, body),) = value.items()
    place = (*place, str(name))
    try:
        entry = find(str(name))
    except PosttrainError as error:
        raise where.error(place, str(error)) from None
    if body is not None and not isinstance(body, Mapping):
        raise where.error(place, f"{name} is {body!r}; expected settings, as in {{steps: 60}}")
    return stage_of(entry, dict(body or {}), place, where)


def stage_of(entry: Entry, given: dict[str, Any], place: Place = (), where: Where | None = None) -> StageSpec:
    """A stage from a method and what was set for it: its own arguments, settings, data and reward."""
    where = where or Where()
    _known(given, (*entry.parameters, *NAMES, *STAGE_KEYS), place, where)
    hints = get_type_hints(inspect.unwrap(entry.function))
    arguments = {k: _typed(hints.get(k, Any), v, (*place, k), where) for k, v in given.items() if k in entry.parameters}
    setting_hints = get_type_hints(Settings)
    settings = {}
    for key, value in given.items():
        if key in NAMES and key not in entry.parameters:
            value = seconds(value, (*place, key), where) if key == "budget" else value
            settings[key] = _typed(setting_hints[key], value, (*place, key), where)
    data = given.get("data")
    if data is not None:
        data = _checked(DataSpec, data if isinstance(data, Mapping) else {"source": data}, (*place, "data"), where)
    try:
        method = entry.function(**arguments).with_settings(**settings)
    except (PosttrainError, ValueError) as error:
        bad = next((k for k in given if re.search(rf"\b{k}\b", str(error))), None)
        raise where.error((*place, bad) if bad else place, str(error)) from None
    if settings.get("epochs") is not None and "steps" not in settings:
        method = replace(method, settings=replace(method.settings, steps=None))
    return StageSpec(method, data, given.get("reward"), given)


def seconds(value: Any, place: Place = (), where: Where | None = None) -> float:
    """A duration: seconds as a number, or text such as 90s, 10m, 1.5h."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    found = re.fullmatch(r"\s*([0-9.]+)\s*([smh]?)\s*", str(value))
    if not found:
        raise (where or Where()).error(place, f"budget is {value!r}; expected a duration such as 90s, 10m or 1h")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def _known(given: Mapping[Any, Any], known: Sequence[str], place: Place, where: Where) -> None:
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise where.error((*place, str(key)), f"unknown key {key!r}; {hint}")


def _typed(hint: Any, value: Any, place: Place, where: Where) -> Any:
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise where.error(place, f"{place[-1]} is {value!r}; {reason[0].lower()}{reason[1:]}") from None


def _checked(kind: type[Any], value: Any, place: Place, where: Where) -> Any:
    if not isinstance(value, Mapping):
        raise where.error(place, f"{place[-1]} is {value!r}; expected a mapping with {', '.join(kind.model_fields)}")
    _known(value, tuple(kind.model_fields), place, where)
    try:
        return kind(**value)
    except ValidationError as error:
        first = error.errors()[0]
        inner = (*place, *first["loc"])
        reason = f"{first['msg'][0].lower()}{first['msg'][1:]}"
        raise where.error(inner, f"{inner[-1]} is {first.get('input')!r}; {reason}") from None
