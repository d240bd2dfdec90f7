"""The text of a recipe: YAML with the line of every key, overrides put into it, and errors that name their place."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import yaml

from posttrain.trajectory import PosttrainError

Place = tuple[str | int, ...]  # path of keys and indices inside a recipe


class RecipeError(PosttrainError):
    """A mistake in a recipe; the message starts with `file:line`."""


@dataclass(frozen=True)
class Where:
    """Turns a place inside a recipe into `file:line`, or into the override that was put there."""

    name: str = "recipe"
    lines: Mapping[Place, int] = field(default_factory=dict)
    overrides: Mapping[Place, str] = field(default_factory=dict)

    def error(self, place: Place, message: str) -> RecipeError:
        for around in (place[:n] for n in range(len(place), -1, -1)):
            if around in self.overrides:
                return RecipeError(f"{self.overrides[around]}: {message}")
            if around in self.lines:
                return RecipeError(f"{self.name}:{self.lines[around]}: {message}")
        return RecipeError(f"{self.name}: {message}" if self.name else message)


class _Loader(yaml.SafeLoader):
    """Safe YAML in which 1e-5 is a number and 2:4 is text, as in YAML 1.2 (1.1 has it the other way round: 2:4 is 124,
    in base 60).
    """


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)[eE][-+]?\d+\Z"), list("-+.0123456789")
)
for _first in "-+0123456789":  # before the resolver of whole numbers, which would have it
    _text = ("tag:yaml.org,2002:str", re.compile(r"[-+]?\d+(:\d+)+(\.\d*)?\Z"))
    _Loader.yaml_implicit_resolvers[_first].insert(0, _text)


def read_yaml(text: str, name: str) -> tuple[Any, dict[Place, int]]:
    """The values of a YAML text, and the line (from 1) of every key and item."""
    lines: dict[Place, int] = {}

    def walk(node: yaml.Node, place: Place) -> None:
        lines.setdefault(place, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            seen: set[str] = set()
            for key, value in node.value:
                word = str(key.value)
                inner = (*place, word)
                lines[inner] = key.start_mark.line + 1
                if word in seen:
                    raise RecipeError(f"{name}:{lines[inner]}: {word} is given twice")
                seen.add(word)
                walk(value, inner)
        elif isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                walk(item, (*place, i))

    try:
        root = yaml.compose(text, Loader=_Loader)
        if root is not None:
            walk(root, ())
        return yaml.load(text, Loader=_Loader), lines
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RecipeError(f"{name}:{line}: broken YAML: {error.problem}") from error
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-01
        raise RecipeError(f"{name}: broken YAML: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise RecipeError(f"{name}: broken YAML: nested too deeply, or an anchor inside itself") from None


def override(values: Any, assignments: Sequence[str], where: Where) -> tuple[Any, Where]:
    """A recipe's values with some replaced, and where they came from.

    assignments: keys, an equals sign and a YAML value: `stages.0.epochs=3`, `task.terms=[2, 3]`. The method's name may
        stand behind a stage's number or be left out.
    """
    values, lines, places = copy.deepcopy(values), dict(where.lines), dict(where.overrides)
    for text in assignments:
        path, equals, written = text.partition("=")
        if not equals or not all(path.split(".")):
            raise RecipeError(f"{text}: expected KEY=VALUE, as in stages.0.epochs=3")
        place = _assign(values, path.split("."), read_yaml(written, text)[0], text)
        for known in (lines, places):
            for inside in [p for p in known if p[: len(place)] == place]:
                del known[inside]
        places[place] = text
    return values, replace(where, lines=lines, overrides=places)


def _assign(node: Any, keys: list[str], value: Any, text: str) -> Place:
    """Put a value where the keys lead, making mappings on the way; returns its place."""
    place: Place = ()
    for depth, key in enumerate(keys):
        before = ".".join(keys[:depth]) or "the recipe"
        at: Any = key
        if isinstance(node, list):
            if not key.isdigit() or int(key) >= len(node):
                raise RecipeError(f"{text}: {before} has no {key}; expected 0 to {len(node) - 1}")
            at = int(key)
        elif not isinstance(node, dict):
            raise RecipeError(f"{text}: {before} is {node!r} and has no {key}")
        place = (*place, at)
        if depth == len(keys) - 1:
            node[at] = value
            break
        inner: Any = _opened(place, node[at] if isinstance(node, list) else node.get(at))
        node[at], node = inner, inner
        if place[:-1] == ("stages",) and isinstance(node, dict) and len(node) == 1 and keys[depth + 1] not in node:
            (method,) = node
            inner = node[method] or {}
            place, node[method], node = (*place, method), inner, inner
    return place


def _opened(place: Place, value: Any) -> Any:
    """What is written short as the mapping it stands for, so that a key of it can be set."""
    if value is None:
        return {}
    if isinstance(value, str) and place[:-1] == ("stages",):
        return {value: {}}
    short = {"model": "id", "data": "source", "engine": "name"}
    if isinstance(value, str) and place[-1] in short:
        return {short[str(place[-1])]: value}
    return value
