"""Checking what a recipe gives against what is known: keys, types, durations; every mistake names its place."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from pydantic import Field, ValidationError

from posttrain.methods.registry import Entry
from posttrain.recipe_text import Place, Where
from posttrain.training.duration import in_seconds
from posttrain.training.settings import NAMES, Settings
from posttrain.training.values import in_yaml, of_kind, reason
from posttrain.trajectory import PosttrainError

Count = Annotated[int, Field(strict=True, ge=1)]
Amount = Annotated[float, Field(strict=True, ge=0)]


def known_keys(given: Mapping[Any, Any], known: Sequence[str], place: Place, where: Where) -> None:
    """An error for a key that is none of the known ones."""
    for key in given:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise where.error((*place, str(key)), f"unknown key {key!r}; {hint}")


def checked(kind: type[Any], value: Any, place: Place, where: Where) -> Any:
    """A pydantic model of a mapping."""
    if not isinstance(value, Mapping):
        raise where.error(place, f"{place[-1]} is {value!r}; expected a mapping with {', '.join(kind.model_fields)}")
    known_keys(value, tuple(kind.model_fields), place, where)
    try:
        return kind(**value)
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "missing":
            raise where.error(place, f"{first['loc'][-1]} is missing in {place[-1]}") from None
        inner, found = [], value
        for key in first["loc"]:  # which also names the members of a union: those are no keys
            if not (key in found if isinstance(found, Mapping) else isinstance(found, list) and isinstance(key, int)):
                break
            inner.append(key)
            found = found[key]
        name = ".".join(map(str, inner)) or str(place[-1])
        raise where.error((*place, *inner), f"{name} is {found!r}; {reason(error)}") from None


def checked_settings(given: Mapping[str, Any], place: Place = (), where: Where | None = None) -> dict[str, Any]:
    """Settings of a stage with their types checked; a budget may be text."""
    where = where or Where()
    known_keys(given, NAMES, place, where)
    hints = get_type_hints(Settings)
    values = {k: seconds(v, (*place, k), where) if k == "budget" and v is not None else v for k, v in given.items()}
    values = {k: typed(hints[k], v, (*place, k), where) for k, v in values.items()}
    for key in ("epochs", "budget"):
        if values.get(key) == 0:
            raise where.error((*place, key), f"{key} is 0; expected more (nothing would be trained)")
    return values


def seconds(value: Any, place: Place = (), where: Where | None = None) -> float:
    """A duration: seconds as a number, or text such as 90s, 10m, 1.5h."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    found = in_seconds(str(value))
    if found is None:
        raise (where or Where()).error(place, f"budget is {value!r}; expected a duration such as 90s, 10m or 1h")
    return found


# -- arguments of methods ----------------------------------------------------------------------------------------------


def arguments_of(entry: Entry, given: Mapping[str, Any], place: Place, where: Where) -> dict[str, Any]:
    """Those among `given` that are arguments of the method, with their types checked."""
    hints = get_type_hints(inspect.unwrap(entry.function))
    return {k: typed(hints.get(k, Any), v, (*place, k), where) for k, v in given.items() if k in entry.parameters}


@contextmanager
def mistakes_at(place: Place, given: Mapping[Any, Any], where: Where) -> Iterator[None]:
    """What a method refuses is a mistake of the recipe, at the key among `given` that it speaks of."""
    try:
        yield
    except (PosttrainError, ValueError) as error:
        raise where.error((*place, *named_in(error, given)), str(error)) from None


def named_in(error: Exception, given: Mapping[Any, Any]) -> Place:
    """The key among `given` that an error speaks of, as the end of a place; nothing where it speaks of none."""
    return next(((str(k),) for k in given if re.search(rf"\b{re.escape(str(k))}\b", str(error))), ())


def listed(values: Mapping[str, Any]) -> dict[str, Any]:
    """With lists in the place of tuples, as YAML has them."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}


# -- types -------------------------------------------------------------------------------------------------------------


def typed(hint: Any, value: Any, place: Place, where: Where) -> Any:
    """The value, which must already be of the type (a whole number will do for a fraction, a list for a tuple)."""
    if isinstance(value, list) and any(get_origin(kind) is tuple for kind in (hint, *get_args(hint))):
        value = tuple(value)
    kinds = in_yaml(hint)
    if not kinds:
        raise where.error(place, f"{place[-1]} is {value!r}; it can only be given in Python")
    try:
        return of_kind(kinds, value)
    except ValueError as error:
        raise where.error(place, f"{place[-1]} is {value!r}; {error}") from None
