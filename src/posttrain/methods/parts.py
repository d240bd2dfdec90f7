"""A method written out: the parts of its objective, and whatever else in it differs from the plain case."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from pathlib import Path
from typing import Any

from posttrain.compress.method import Compression
from posttrain.objective.estimator import Objective
from posttrain.objective.mixture import Mixture
from posttrain.training.method import OBJECTIVE_PARTS, Method, Pipeline

TOLD_ELSEWHERE = ("name", "objective", "data", "settings", "arguments")
COMPRESSION_PARTS = ("transforms", "allocation", "solver", "activations", "attention", "calibration", "skip")
Parts = dict[str, Any]


def parts_of(made: Method | Pipeline | Compression, *, brief: bool = False) -> Parts:
    """Parts by name, each as the call that makes it (see `written`).

    A mixture of objectives has `terms` in the place of the parts of one, a pipeline has `stages`: lists of such
    mappings, a term's with its `sources` and `weight`, a stage's with its `method`. A compression has parts of its own.
    """
    if isinstance(made, Compression):
        return {name: written(getattr(made, name) or (), brief=brief) for name in COMPRESSION_PARTS}
    if isinstance(made, Pipeline):
        return {"stages": [{"method": stage.name, **parts_of(stage, brief=brief)} for stage in made.stages]}
    return {**_objective(made.objective, brief), **beside(made, brief=brief)}


def beside(method: Method, *, brief: bool = False) -> dict[str, str]:
    """What a method has beside its objective that a plain one has not: the fields that differ from their default."""
    return {
        name: written(getattr(method, name), brief=brief)
        for name, default in fields_beside().items()
        if getattr(method, name) != default
    }


def fields_beside() -> dict[str, Any]:
    """What a method may have beside its objective, data and settings, with what a plain method has there."""
    return {f.name: default_of(f) for f in dataclasses.fields(Method) if f.name not in TOLD_ELSEWHERE}


def objectives_of(made: Method | Pipeline | Compression) -> list[Objective]:
    """Every objective in it: of each stage, of each term. A compression has none."""
    if isinstance(made, Compression):
        return []
    methods = made.stages if isinstance(made, Pipeline) else (made,)
    found: list[Objective] = []
    for method in methods:
        objective = method.objective
        found += [t.objective for t in objective.terms] if isinstance(objective, Mixture) else [objective]
    return found


def written(part: object, *, brief: bool = False) -> str:
    """A part as the call that makes it; `brief` leaves out what is as by default.

    A tuple is written as a list with commas (`none` when empty), a function or class by its name.
    """
    if isinstance(part, tuple):
        return ", ".join(written(p, brief=brief) for p in part) or "none"
    if isinstance(part, functools.partial):
        return _partial(part, brief)
    if isinstance(part, type) or (callable(part) and hasattr(part, "__qualname__")):
        return part.__qualname__.rpartition("<locals>.")[2]
    if dataclasses.is_dataclass(part):
        return _call(part, brief)
    if part is None or isinstance(part, bool | int | float | str):
        return repr(part)
    if isinstance(part, Path):
        return str(part)
    text = repr(part)
    return type(part).__name__ if " at 0x" in text or "\n" in text else text


def _objective(objective: Objective | Mixture, brief: bool) -> Parts:
    if isinstance(objective, Mixture):
        terms = [
            {
                "sources": ", ".join(term.sources),
                "weight": written(term.weight, brief=brief),
                **_objective(term.objective, brief),
            }
            for term in objective.terms
        ]
        own = [f.name for f in dataclasses.fields(objective) if f.name != "terms"]  # of a mixture of a special kind
        return {"terms": terms, **{name: written(getattr(objective, name), brief=brief) for name in own}}
    return {part: written(getattr(objective, part), brief=brief) for part in OBJECTIVE_PARTS}


def _partial(part: functools.partial[Any], brief: bool) -> str:
    known = inspect.signature(part.func).parameters
    keywords = {k: v for k, v in part.keywords.items() if not (brief and k in known and v == known[k].default)}
    given = [written(a, brief=brief) for a in part.args]
    given += [f"{k}={written(v, brief=brief)}" for k, v in keywords.items()]
    return f"{written(part.func)}({', '.join(given)})" if given or not brief else written(part.func)


def _call(part: Any, brief: bool) -> str:
    """A dataclass as a call. Briefly: without brackets where nothing was given, without the name of what had to be."""
    given = []
    for field in dataclasses.fields(part):
        value, default = getattr(part, field.name), default_of(field)
        if not field.init or not field.repr or (brief and value == default):
            continue
        text = written(value, brief=brief)
        if isinstance(value, tuple):
            text = f"({text})" if value else "()"
        given.append(text if brief and default is dataclasses.MISSING else f"{field.name}={text}")
    return f"{type(part).__name__}({', '.join(given)})" if given or not brief else type(part).__name__


def default_of(field: dataclasses.Field[Any]) -> Any:
    """What a field holds where it is not given; `dataclasses.MISSING` where it must be."""
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
