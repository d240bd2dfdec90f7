"""The registry: methods by the names their papers use."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ParamSpec

from posttrain.training.method import OBJECTIVE_PARTS, Method
from posttrain.trajectory import PosttrainError

P = ParamSpec("P")


@dataclass(frozen=True)
class Entry:
    """A registered method. card: three digits, several of them, or None where no card describes it."""

    name: str
    family: str
    card: str | tuple[str, ...] | None
    function: Callable[..., Method]

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    @property
    def parameters(self) -> dict[str, Any]:
        """Arguments and their defaults."""
        return {n: p.default for n, p in inspect.signature(self.function).parameters.items()}

    @property
    def parts(self) -> dict[str, str]:
        """The method's parts with its defaults, each as its constructor call."""
        objective = self.function().objective
        return {part: _show(getattr(objective, part)) for part in OBJECTIVE_PARTS}


_METHODS: dict[str, Entry] = {}


def method(
    *, family: str, card: str | tuple[str, ...] | None = None, name: str | None = None
) -> Callable[[Callable[P, Method]], Callable[P, Method]]:
    """Register a function that returns a `Method`, under its own name with hyphens unless another is given.

    The method it returns carries that name and the arguments of the call.
    """

    def register(function: Callable[P, Method]) -> Callable[P, Method]:
        known = name or function.__name__.replace("_", "-")
        signature = inspect.signature(function)

        @functools.wraps(function)
        def build(*args: P.args, **kwargs: P.kwargs) -> Method:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return replace(function(*args, **kwargs), name=known, arguments=dict(bound.arguments))

        if not function.__doc__:
            raise PosttrainError(f"method {known} has no docstring; expected its definition, arguments and reference")
        _METHODS[known] = Entry(known, family, card, build)
        return build

    return register


def registered() -> dict[str, Entry]:
    """All methods by name, in order of family and name."""
    return dict(sorted(_METHODS.items(), key=lambda item: (item[1].family, item[0])))


def find(name: str) -> Entry:
    """The method of that name; underscores and case do not matter."""
    known = name.lower().replace("_", "-")
    if known in _METHODS:
        return _METHODS[known]
    near = difflib.get_close_matches(known, _METHODS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(_METHODS)}"
    raise PosttrainError(f"unknown method {name!r}; {hint}")


def _show(part: object) -> str:
    if isinstance(part, tuple):
        return ", ".join(_show(p) for p in part) or "none"
    return repr(part).replace("posttrain.", "")
