"""Recipes: YAML to stages, everything checked before anything loads.

Every mistake (unknown key or method, wrong type, missing part) is one line that names the line of the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool

from posttrain.data.formats import parse
from posttrain.data.rows import BadRow
from posttrain.data.sources import EXTENSIONS, read_rows
from posttrain.evaluation.task import Task
from posttrain.evaluation.tasks import task_from
from posttrain.methods.registry import Entry, find
from posttrain.objective.advantage import DecoupledGroupNormalised, GroupNormalised, LeaveOneOut
from posttrain.recipe_compress import (
    SPELLINGS,
    CompressSpec,
    check_compress,
    chosen_method,
    compress_spec,
    refuse_after,
)
from posttrain.recipe_text import Place, RecipeError, Where, override, read_yaml
from posttrain.recipe_values import (
    Amount,
    Count,
    arguments_of,
    checked,
    checked_settings,
    known_keys,
    listed,
    mistakes_at,
    named_in,
)
from posttrain.reward.reward import reward_from
from posttrain.rollout.engine_choice import EngineChoice
from posttrain.rollout.pool.cluster import Cluster
from posttrain.training.method import Method, Pipeline, stages_of
from posttrain.training.settings import NAMES
from posttrain.training.values import checked_seed
from posttrain.trajectory import PosttrainError


class ModelSpec(BaseModel):
    """model: where it comes from and how it is computed (see `load`)."""

    model_config = ConfigDict(extra="forbid")
    id: str
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    device: str | None = None
    trust_remote_code: StrictBool = False
    revision: str | None = None


class DataSpec(BaseModel):
    """data: rows of a stage's own (see `load_dataset`); `heldout` keeps a share or a number of rows for evaluation."""

    model_config = ConfigDict(extra="forbid")
    source: str | list[dict[str, Any]]
    kind: Literal["demonstrations", "preferences", "feedback", "prompts"] | None = None
    columns: dict[str, str] = {}
    system: str | None = None
    chat: StrictBool = True
    max_length: Count | None = None
    on_bad: Literal["stop", "skip"] = "stop"
    split: str = "train"
    heldout: Amount = 0.0


class EngineSpec(BaseModel):
    """engine: what draws completions, in training and evaluation (see `EngineChoice`)."""

    model_config = ConfigDict(extra="forbid")
    name: str
    python: str | None = None
    exchange: str | None = None
    options: dict[str, Any] = {}


class ClusterSpec(BaseModel):
    """cluster: draw and score completions on a Ray cluster (see `Cluster`)."""

    model_config = ConfigDict(extra="forbid")
    address: str = "local"
    workers: Count = 2
    cpus: Count = 1
    gpus: Amount = 0.0
    reward_workers: Annotated[int, Field(strict=True, ge=0)] = 0
    piece: Count | None = None
    working_dir: str | None = None


class EvaluateSpec(BaseModel):
    """evaluate: `samples` completions on `holdout` held-out prompts before and after (greedy with one sample)."""

    model_config = ConfigDict(extra="forbid")
    samples: Count = 1
    holdout: Count | None = None
    max_tokens: Count = 128
    temperature: Amount | None = None
    k: list[Count] = [1]
    before: StrictBool = True


@dataclass(frozen=True)
class Origin:
    """The pipeline of the catalogue that a stage belongs to, the arguments it was made with, and the stage's number."""

    name: str
    arguments: dict[str, Any]
    index: int

    @property
    def method(self) -> Method:
        """The stage as the catalogue makes it."""
        return stages_of(find(self.name).function(**self.arguments))[self.index]


@dataclass(frozen=True)
class StageSpec:
    """A stage: the method with its settings, and data or reward of its own.

    given: what the recipe wrote; place: where. origin: set for a stage of a pipeline that the recipe names as one.
    """

    method: Method
    data: DataSpec | None = None
    reward: Any = None
    given: dict[str, Any] = field(default_factory=dict)
    origin: Origin | None = None
    place: Place = field(default=(), compare=False)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. task: what `task_from` takes; output: the run folder; where: its places, for messages."""

    model: ModelSpec
    stages: tuple[StageSpec | CompressSpec, ...]
    task: Any = None
    evaluate: EvaluateSpec = field(default_factory=EvaluateSpec)
    seed: int = 0
    output: Path | None = None
    engine: EngineChoice = field(default_factory=EngineChoice)
    cluster: Cluster | None = None
    where: Where = field(default_factory=Where, compare=False, repr=False)

    def built_task(self) -> Task | None:
        """The task, built (problems are generated or read now); a mistake in it names its line."""
        if self.task is None:
            return None
        try:
            return task_from(self.task)
        except PosttrainError as error:
            options = self.task if isinstance(self.task, Mapping) else {}
            raise self.where.error(("task", *named_in(error, options)), str(error)) from None

    def resolved(self) -> dict[str, Any]:
        """The recipe with every default written out; as YAML it runs the same."""
        stages = []
        for stage in self.stages:
            if isinstance(stage, CompressSpec):
                stages.append(stage.resolved())
                continue
            origin = stage.origin
            if origin is not None:  # its stages have settings of their own, which only the pipeline's name stands for
                if origin.index == 0:
                    stages.append({origin.name: listed({**origin.arguments, **stage.given})})
                continue
            body = listed({**stage.method.arguments, **stage.method.settings.as_dict()})
            if stage.data is not None:
                body["data"] = stage.data.model_dump(exclude_none=True)
            if stage.reward is not None:
                body["reward"] = stage.reward
            stages.append({stage.method.name: body})
        found: dict[str, Any] = {"model": self.model.model_dump(exclude_none=True)}
        if self.task is not None:
            found["task"] = self.task if isinstance(self.task, str | Mapping) else getattr(self.task, "name", "task")
        if self.cluster is not None:
            found["cluster"] = {name: value for name, value in asdict(self.cluster).items() if value is not None}
        if not self.engine.embedded:
            found["engine"] = {name: value for name, value in vars(self.engine).items() if value}
        return found | {
            "stages": stages,
            "evaluate": self.evaluate.model_dump(exclude_none=True),
            "seed": self.seed,
        }


KEYS = ("model", "task", "stages", "evaluate", "engine", "cluster", "seed", "output")
STAGE_KEYS = ("data", "reward")


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe file.

    overrides: values put in place of the file's, each as `path.of.keys=YAML` (see `override`).
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"no recipe at {path}: expected a YAML file with model, task and stages") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read {path}: {error}") from error
    values, lines = read_yaml(text, str(path))
    return parse_recipe(*override(values, overrides, Where(str(path), lines)))


def parse_recipe(values: Any, where: Where | None = None) -> Recipe:
    """Check a recipe given as nested mappings."""
    where = where or Where()
    if not isinstance(values, Mapping):
        raise where.error((), f"got {type(values).__name__}; expected a mapping with model, task and stages")
    known_keys(values, KEYS, (), where)
    if "model" not in values:
        raise where.error((), "model is missing; expected a bundled name, folder, GGUF file or hub id")
    if "stages" not in values:
        raise where.error((), "stages is missing; expected a list such as [sft: {epochs: 1}]")
    model = values["model"]
    spec = checked(ModelSpec, {"id": model} if isinstance(model, str) else model, ("model",), where)
    stages = values["stages"]
    if not isinstance(stages, Sequence) or isinstance(stages, str) or not stages:
        raise where.error(("stages",), f"stages is {stages!r}; expected a list such as [sft: {{epochs: 1}}]")
    with_task = values.get("task") is not None
    parsed = tuple(
        spec for i, stage in enumerate(stages) for spec in _stages(stage, ("stages", i), where, with_task=with_task)
    )
    seed, output = values.get("seed", 0), values.get("output")
    try:
        checked_seed(seed)
    except PosttrainError as error:
        raise where.error(("seed",), str(error)) from None
    if not isinstance(output, str | Path | None) or output == "":
        raise where.error(("output",), f"output is {output!r}; expected a folder that does not exist yet")
    given = values.get("evaluate")
    evaluate = checked(EvaluateSpec, {} if given is None else given, ("evaluate",), where)
    task = values.get("task")
    if not isinstance(task, str | Mapping | Task | None):
        raise where.error(("task",), f"task is {task!r}; expected a name, a file or a mapping")
    engine = engine_choice(values.get("engine"), where)
    cluster = cluster_of(values.get("cluster"), where)
    recipe = Recipe(spec, parsed, task, evaluate, seed, Path(output) if output else None, engine, cluster, where)
    check(recipe)
    return recipe


def engine_choice(given: Any, where: Where | None = None) -> EngineChoice:
    """The engine from its name, a URL, or a mapping with `name`; the embedded one for None."""
    where = where or Where()
    if given is None:
        return EngineChoice()
    spec = checked(EngineSpec, {"name": given} if isinstance(given, str) else given, ("engine",), where)
    try:
        return EngineChoice(**spec.model_dump())
    except PosttrainError as error:
        raise where.error(("engine",), str(error)) from None


def cluster_of(given: Any, where: Where | None = None) -> Cluster | None:
    """The cluster from its address or a mapping; None for none."""
    if given is None:
        return None
    where = where or Where()
    spec = checked(ClusterSpec, {"address": given} if isinstance(given, str) else given, ("cluster",), where)
    return Cluster(**spec.model_dump())


def check(recipe: Recipe) -> None:
    """What only shows when the parts are seen together, so that a late stage cannot fail on what was wrong before."""
    where = recipe.where
    _check_device(recipe.model.device, where)
    spec = recipe.evaluate
    if max(spec.k, default=1) > spec.samples:
        raise where.error(("evaluate", "k"), f"pass@{max(spec.k)} needs samples: {max(spec.k)}; got {spec.samples}")
    if spec.samples > 1 and spec.temperature == 0:
        raise where.error(("evaluate", "temperature"), f"{spec.samples} samples at temperature 0 are all the same")
    if recipe.cluster is not None and not recipe.engine.embedded:
        name = recipe.engine.name
        raise where.error(
            ("cluster",), f"the workers of a cluster draw by the embedded engine; leave out engine: {name}"
        )
    for i, stage in enumerate(recipe.stages):
        place: Place = stage.place or ("stages", i, stage.method.name)
        for before in recipe.stages[:i]:
            if isinstance(before, CompressSpec):
                refuse_after(stage.method.name, before, place[:2], where, trains=isinstance(stage, StageSpec))
        if isinstance(stage, CompressSpec):
            check_compress(stage, where, with_task=recipe.task is not None)
        else:
            _check_training(stage, place, where, with_task=recipe.task is not None)


def _check_training(stage: StageSpec, place: Place, where: Where, *, with_task: bool) -> None:
    name, needs = stage.method.name, stage.method.data
    if stage.data is None and needs in ("preferences", "feedback"):
        raise where.error(place[:2], f"{name} learns from {needs}; give the stage data: FILE")
    if stage.data is None and not with_task:
        raise where.error(place[:2], f"{name} has nothing to train on; give a task, or the stage data: FILE")
    if needs == "prompts" and stage.reward is None and not with_task:
        raise where.error(place[:2], f"{name} needs a reward; give a task, or the stage reward: NAME")
    if stage.method.online and stage.method.settings.group < 2 and _compares_group(stage.method):
        raise where.error((*place, "group"), f"{name} compares completions of a prompt; group is 1, expected 2 or more")
    try:
        if stage.reward is not None:
            reward_from(stage.reward)
    except PosttrainError as error:
        raise where.error((*place, "reward"), str(error)) from None
    if stage.data is not None:
        _peek(stage.data, stage.method, (*place, "data"), where)


def _check_device(device: str | None, where: Where) -> None:
    if device is None:
        return
    try:
        place = torch.device(device)
    except RuntimeError:
        raise where.error(("model", "device"), f"device is {device!r}; expected such as cpu, cuda or cuda:1") from None
    there = torch.cuda.device_count()
    if place.type == "cuda" and (place.index or 0) >= there:
        raise where.error(("model", "device"), f"device is {device!r}; this machine has {there} CUDA devices; set cpu")


def _compares_group(method: Method) -> bool:
    """Whether a completion's credit comes from the other completions of its prompt."""
    relative = GroupNormalised | DecoupledGroupNormalised | LeaveOneOut
    return any(isinstance(p, relative) or getattr(p, "baseline", None) == "group" for p in method.objective.parts)


def _peek(data: DataSpec, method: Method, place: Place, where: Where) -> None:
    """A file is there and its first row is of the kind that the method learns from."""
    if data.kind not in (None, method.data):
        raise where.error((*place, "kind"), f"{method.name} learns from {method.data}; kind is {data.kind}")
    if isinstance(data.source, str) and not _is_file(data.source):
        return  # a hub id or a saved data set: read when the stage begins
    try:
        row = next(iter(read_rows(data.source, split=data.split)))
        if data.on_bad == "stop":
            if row.error is not None:
                raise row.error
            parse(row.values, method.data, data.columns)
    except BadRow as error:
        raise where.error(place, str(error if error.origin is not None else error.at(row.origin))) from None
    except PosttrainError as error:
        raise where.error(place, str(error)) from None


def _is_file(source: str) -> bool:
    path = Path(source).expanduser()
    return path.is_file() or path.name.lower().removesuffix(".gz").endswith(EXTENSIONS)


def _stages(value: Any, place: Place, where: Where, *, with_task: bool) -> tuple[StageSpec | CompressSpec, ...]:
    if isinstance(value, str):
        value = {value: {}}
    if not isinstance(value, Mapping) or len(value) != 1:
        got = ", ".join(map(str, value)) if isinstance(value, Mapping) and value else repr(value)
        raise where.error(place, f"got {got}; expected one method with its settings, as in grpo: {{steps: 60}}")
    ((name, body),) = value.items()
    place = (*place, str(name))
    if name in SPELLINGS:
        entry, given = chosen_method(str(name), body, place, where)
        return (compress_spec(entry, given, place, where),)
    try:
        entry = find(str(name))
    except PosttrainError as error:
        raise where.error(place, str(error)) from None
    if body is not None and not isinstance(body, Mapping):
        example = "{bits: 4}" if entry.kind == "compression" else "{steps: 60}"
        raise where.error(place, f"{name} is {body!r}; expected settings, as in {example}")
    if entry.kind == "compression":
        return (compress_spec(entry, dict(body or {}), place, where),)
    return stage_specs(entry, dict(body or {}), place, where, with_task=with_task)


def stage_specs(
    entry: Entry, given: dict[str, Any], place: Place = (), where: Where | None = None, *, with_task: bool = False
) -> tuple[StageSpec, ...]:
    """A stage from a method and what was set for it: its own arguments, settings, data and reward.

    A pipeline gives a stage for each of its methods. Settings are for all of them, rows for those that learn from rows
    (of that kind, where one is told; without a task for the others too), a reward for those that sample.
    """
    where = where or Where()
    known_keys(given, (*entry.parameters, *NAMES, *STAGE_KEYS), place, where)
    arguments = arguments_of(entry, given, place, where)
    own = {k: v for k, v in given.items() if k in NAMES and k not in entry.parameters}
    settings = checked_settings(own, place, where)
    data = given.get("data")
    if data is not None:
        data = checked(DataSpec, data if isinstance(data, Mapping) else {"source": data}, (*place, "data"), where)
    with mistakes_at(place, given, where):
        made = entry.function(**arguments)
        methods = [method.with_settings(**settings) for method in stages_of(made)]
    reward = given.get("reward")
    if reward is not None and not any(method.online for method in methods):
        kinds = " and ".join(dict.fromkeys(method.data for method in methods))
        raise where.error((*place, "reward"), f"{entry.name} learns from {kinds} and takes no reward")
    if settings.get("epochs") is not None and "steps" not in settings:
        methods = [replace(method, settings=replace(method.settings, steps=None)) for method in methods]
    if not isinstance(made, Pipeline):
        return (StageSpec(methods[0], data, reward, given, place=place),)
    return tuple(
        StageSpec(
            method,
            data if data is not None and _is_for(data, method, with_task) else None,
            reward if method.online else None,
            given,
            Origin(entry.name, {**entry.parameters, **arguments}, i),
            place,
        )
        for i, method in enumerate(methods)
    )


def _is_for(data: DataSpec, method: Method, with_task: bool) -> bool:
    """Whether a stage of a pipeline takes the rows that the pipeline was given."""
    return data.kind == method.data if data.kind is not None else not (method.online and with_task)
