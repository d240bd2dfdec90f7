"""Stages of a recipe that compress the model: what they may say, and what they are calibrated on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from posttrain.compress.method import Compression
from posttrain.data.sources import EXTENSIONS, read_rows
from posttrain.methods.registry import Entry, find
from posttrain.recipe_text import Place, Where
from posttrain.recipe_values import Count, arguments_of, known_keys, listed, mistakes_at, typed
from posttrain.training.settings import NAMES
from posttrain.trajectory import PosttrainError

SPELLINGS = ("quantize", "prune")  # `quantize: {method: gptq, bits: 4}` says what `gptq: {bits: 4}` says
TASK = "task"  # calibration: task
KEYS = ("calibration", "samples", "length", "skip")
TEXT = (".txt", ".md")
Texts = str | tuple[str, ...]


@dataclass(frozen=True)
class CompressSpec:
    """A stage that compresses: the method, calibrated on as much text as the stage says, but for the layers to skip.

    calibration: a file, a hub id or texts; None for the training problems of the recipe's task with their solutions.
    given: what the recipe wrote; place: where.
    """

    method: Compression
    calibration: Texts | None = None
    skip: tuple[str, ...] = ()
    given: dict[str, Any] = field(default_factory=dict)
    place: Place = field(default=(), compare=False)

    def resolved(self) -> dict[str, Any]:
        """The stage with every default written out."""
        much = self.method.calibration
        text = {"calibration": self.calibration or TASK} if self.method.uses_data else {}
        said = {**text, "samples": much.samples, "length": much.length, "skip": self.skip}
        return {self.method.name: listed({**self.method.arguments, **said})}


def compress_spec(entry: Entry, given: dict[str, Any], place: Place, where: Where) -> CompressSpec:
    """A stage from a compression method and what was set for it."""
    for key in given.keys() & {*NAMES, "data", "reward"} - entry.parameters.keys():
        instead = "; give its text as calibration: FILE" if key == "data" else ""
        raise where.error((*place, key), f"{key} is for stages that train, and {entry.name} compresses{instead}")
    known_keys(given, (*entry.parameters, *KEYS), place, where)
    arguments = arguments_of(entry, given, place, where)
    with mistakes_at(place, given, where):
        method: Compression = entry.function(**arguments)
    much = method.calibration
    samples = typed(Count, given.get("samples", much.samples), (*place, "samples"), where)
    length = typed(Count, given.get("length", much.length), (*place, "length"), where)
    calibration = typed(Texts | None, given.get("calibration"), (*place, "calibration"), where)
    skip = typed(Texts, given.get("skip", ()), (*place, "skip"), where)
    return CompressSpec(
        method.replace(calibration=replace(much, samples=samples, length=length)),
        None if calibration == TASK else calibration,
        (skip,) if isinstance(skip, str) else skip,
        given,
        place,
    )


def chosen_method(spelling: str, body: Any, place: Place, where: Where) -> tuple[Entry, dict[str, Any]]:
    """The method that a stage spelt `quantize: {method: NAME, ...}` names, and what is set for it."""
    if isinstance(body, str):
        body = {"method": body}
    if not isinstance(body, Mapping) or not isinstance(body.get("method"), str):
        raise where.error(place, f"{spelling} names no method; expected such as {spelling}: {{method: gptq, bits: 4}}")
    try:
        entry = find(body["method"])
    except PosttrainError as error:
        raise where.error((*place, "method"), str(error)) from None
    if entry.kind != "compression":
        raise where.error((*place, "method"), f"{entry.name} trains; write it as a stage of its own: {entry.name}: ...")
    return entry, {k: v for k, v in body.items() if k != "method"}


def check_compress(stage: CompressSpec, where: Where, *, with_task: bool) -> None:
    """The stage has text to be calibrated on, and a file that it names is there and can be read."""
    name, source = stage.method.name, stage.calibration
    if source is None:
        if not with_task and stage.method.uses_data:
            raise where.error(
                stage.place, f"{name} has nothing to be calibrated on; give a task, or the stage calibration: FILE"
            )
        if not with_task and stage.given.get("calibration") == TASK:
            raise where.error((*stage.place, "calibration"), "calibration is task, but the recipe has no task")
    elif isinstance(source, str):
        try:
            _peek(source)
        except PosttrainError as error:
            raise where.error((*stage.place, "calibration"), str(error)) from None
    elif not any(text.strip() for text in source):
        raise where.error((*stage.place, "calibration"), "calibration holds no text; expected a file or texts")


def _peek(source: str) -> None:
    """A file is there, and has a first row if it holds rows; a hub id is read when the stage begins."""
    path = Path(source).expanduser()
    name = path.name.lower().removesuffix(".gz")
    if name.endswith(TEXT) and not path.is_file():
        raise PosttrainError(f"no calibration text at {path}; expected a file of text or rows, a hub id, or task")
    if name.endswith(EXTENSIONS) and (row := next(iter(read_rows(source)))).error is not None:
        raise row.error


def refuse_after(name: str, compressed: CompressSpec, place: Place, where: Where, *, trains: bool) -> None:
    """Nothing can stand behind a stage that compresses: it could neither train nor compress the result."""
    why = (
        "packed weights take no gradient; put the stages that train before it"
        if trains
        else "packed weights are not packed again; give one stage that compresses (skip leaves layers out)"
    )
    verb = "train" if trains else "compress"
    raise where.error(place, f"{name} cannot {verb} what {compressed.method.name} compressed: {why}")
