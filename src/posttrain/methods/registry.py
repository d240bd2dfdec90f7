"""The registry: methods by the names their papers use."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, ParamSpec, TypeVar

from posttrain.compress.method import Compression
from posttrain.methods import verdicts
from posttrain.methods.parts import Parts, parts_of
from posttrain.methods.taxonomy import taxonomy
from posttrain.training.method import Method, Pipeline, stages_of
from posttrain.training.values import check_types
from posttrain.trajectory import PosttrainError

P = ParamSpec("P")
Made = TypeVar("Made", bound=Method | Pipeline | Compression)
Kind = Literal["online", "offline", "pipeline", "compression"]


@dataclass(frozen=True)
class Entry:
    """A registered method. card: three digits, several of them, or None where no card describes it. function: makes
    the `Method`, the `Pipeline` of a recipe that a paper published, or a `Compression`.
    """

    name: str
    family: str
    card: str | tuple[str, ...] | None
    function: Callable[..., Any]
    given_branch: str | None = None

    @property
    def cards(self) -> tuple[str, ...]:
        return (self.card,) if isinstance(self.card, str) else self.card or ()

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return (inspect.getdoc(self.function) or "").split("\n", 1)[0]

    @property
    def parameters(self) -> dict[str, Any]:
        """Arguments and their defaults."""
        return {n: p.default for n, p in inspect.signature(self.function).parameters.items()}

    @property
    def stages(self) -> tuple[Method, ...]:
        """The method with its defaults; of a pipeline, its methods in order. A compression trains nothing: none."""
        made = self.function()
        return () if isinstance(made, Compression) else stages_of(made)

    @property
    def kind(self) -> Kind:
        made = self.function()
        if isinstance(made, Compression):
            return "compression"
        return "pipeline" if isinstance(made, Pipeline) else "online" if made.online else "offline"

    @property
    def parts(self) -> Parts:
        """The method's parts with its defaults, each as its constructor call (see `parts_of`)."""
        return parts_of(self.function())

    @property
    def branch(self) -> str | None:
        """Where it stands in the taxonomy: as registered, else by its card and family."""
        if self.given_branch is None:
            return taxonomy().place(self.family, self.cards)
        if self.given_branch not in taxonomy().branches:
            raise PosttrainError(
                f"method {self.name} has branch {self.given_branch!r}; expected one of "
                f"{', '.join(taxonomy().branches)} (methods/taxonomy.yaml)"
            )
        return self.given_branch

    @property
    def studies(self) -> tuple[verdicts.Verdict, ...]:
        """What the studies that test it found."""
        return verdicts.of_method(self.name)

    @property
    def verdict(self) -> verdicts.Outcome:
        """The studies' verdict in one word; `none` before any."""
        return verdicts.overall(self.studies)


_METHODS: dict[str, Entry] = {}


def method(
    *, family: str, card: str | tuple[str, ...] | None = None, name: str | None = None, branch: str | None = None
) -> Callable[[Callable[P, Made]], Callable[P, Made]]:
    """Register a function that returns a `Method`, a `Pipeline` or a `Compression`, under its own name with hyphens
    unless another is given.

    branch: where it stands in the taxonomy, when its card and family do not say it (see `Entry.branch`).
    The method it returns carries that name and the arguments of the call; the stages of a pipeline carry their own.
    Arguments of a compression are of the types that its function says, or an error.
    """

    def register(function: Callable[P, Made]) -> Callable[P, Made]:
        known = name or function.__name__.replace("_", "-")
        signature = inspect.signature(function)
        compresses = signature.return_annotation in (Compression, "Compression")

        @functools.wraps(function)
        def build(*args: P.args, **kwargs: P.kwargs) -> Made:
            bound = signature.bind(*args, **kwargs)
            if compresses:
                check_types(function, bound.arguments, known)
            bound.apply_defaults()
            made = function(*args, **kwargs)
            if isinstance(made, Pipeline):
                return made
            # YAML has lists alone: what it gives is what a tuple in Python gives
            given = {k: tuple(v) if isinstance(v, list) else v for k, v in bound.arguments.items()}
            return replace(made, name=known, arguments=given)

        if not function.__doc__:
            raise PosttrainError(f"method {known} has no docstring; expected its definition, arguments and reference")
        _METHODS[known] = Entry(known, family, card, build, branch)
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
