"""The registry of studies. The modules of this package that hold them are imported when studies are looked up."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass

from posttrain.methods import registry as methods
from posttrain.reward.names import unknown
from posttrain.studies.study import Study
from posttrain.trajectory import PosttrainError

Builder = Callable[[], Study]


@dataclass(frozen=True)
class Entry:
    """A registered study. methods: whose claims it tests; cards: of the papers, three digits each."""

    name: str
    methods: tuple[str, ...]
    cards: tuple[str, ...]
    function: Builder
    family: str

    @property
    def text(self) -> str:
        """The docstring: the reasoning, for the study's page."""
        return inspect.getdoc(self.function) or ""

    @property
    def summary(self) -> str:
        """First line of the docstring."""
        return self.text.split("\n", 1)[0]

    @property
    def paper(self) -> str:
        """The reference: what follows `Reference:` in the study's docstring, else in that of its first method."""
        catalogue = methods.registered()
        texts = [self.text, *(inspect.getdoc(catalogue[m].function) or "" for m in self.methods if m in catalogue)]
        return next((found for text in texts if (found := _reference(text))), "none")


_STUDIES: dict[str, Entry] = {}


def study(
    *,
    method: str | tuple[str, ...],
    card: str | tuple[str, ...] | None = None,
    name: str | None = None,
    family: str | None = None,
) -> Callable[[Builder], Builder]:
    """Register a function that returns a `Study`, under its own name with hyphens unless another is given.

    method: the method or methods whose claim it tests. card: of its paper, where one describes it.
    family: where the methods are not registered, theirs.
    The function is called anew in every process that runs an arm: it must return the same study each time.
    """

    def register(function: Builder) -> Builder:
        called, names = name or function.__name__.replace("_", "-"), _tuple(method)
        if not function.__doc__:
            raise PosttrainError(f"study {called} has no docstring; expected the reasoning behind it, for its page")
        before = _STUDIES.get(called)
        if before is not None and before.function.__module__ != function.__module__:
            raise PosttrainError(
                f"two studies are called {called}, in {before.function.__module__} and {function.__module__}; give one "
                f"another name"
            )
        _STUDIES[called] = Entry(called, names, _tuple(card or ()), function, family or _family(names, called))
        return function

    return register


def registered() -> dict[str, Entry]:
    """All studies by name, in order of family and name."""
    package = importlib.import_module(__name__.rpartition(".")[0])
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return dict(sorted(_STUDIES.items(), key=lambda item: (item[1].family, item[0])))


def find(name: str) -> Entry:
    """The study of that name; underscores and case do not matter."""
    registered()
    return known(name.lower().replace("_", "-"))


def known(name: str) -> Entry:
    """The study of that exact name among those imported already."""
    if name not in _STUDIES:
        raise unknown("study", name, _STUDIES)
    return _STUDIES[name]


def of_family(family: str) -> list[Entry]:
    """The studies of a family of methods."""
    studies = registered().values()
    families = {entry.family for entry in studies}
    if family not in families:
        raise unknown("family", family, families)
    return [entry for entry in studies if entry.family == family]


def _tuple(given: str | tuple[str, ...]) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else given


def _family(names: tuple[str, ...], study: str) -> str:
    catalogue = methods.registered()
    found = next((catalogue[name].family for name in names if name in catalogue), None)
    if found is None:
        raise PosttrainError(f"study {study}: none of {', '.join(names)} is a registered method; give its family=")
    return found


def _reference(text: str) -> str:
    """What a docstring says after `Reference:`, as one line."""
    found = text.partition("Reference:")[2].split("\n\n", 1)[0]
    return " ".join(found.split()).rstrip(".")
