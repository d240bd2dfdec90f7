"""Models made hastily, where a run need only show that it runs: a few steps of training, hardly measured.

`with hasty():` asks for them: everything called inside of it, in the same thread, gets them. They lie beside the real
models in the cache under names of their own, which are never looked up outside; inside, a real model that is there
already is taken before one is made hastily.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Concatenate, ParamSpec, TypeVar

SUFFIX = "-hasty"  # behind the name of a folder in the cache
STEPS = 30  # of pre-training, at most
MORE = {"facts": 100, "three-tasks": 150}  # where a study cannot run unless some completion is right
PROBLEMS = 8  # held-out ones that a model is measured on

P = ParamSpec("P")
R = TypeVar("R")
_HASTY: ContextVar[bool] = ContextVar("hasty", default=False)


@contextmanager
def hasty(wanted: bool = True) -> Iterator[None]:
    """Inside of it models of the lab are made hastily; with False they are not, whatever is asked for around it."""
    before = _HASTY.set(wanted)
    try:
        yield
    finally:
        _HASTY.reset(before)


def is_hasty() -> bool:
    """Whether models made hastily are asked for here."""
    return _HASTY.get()


def in_haste(other: Callable[Concatenate[Callable[P, R], P], R]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator: where haste is asked for, `other` answers, which is given the function and then its arguments.

    It stands apart from the function's own code because full runs never come by it: fingerprints of what a result
    depends on leave this decorator out.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def chosen(*given: P.args, **named: P.kwargs) -> R:
            return other(function, *given, **named) if is_hasty() else function(*given, **named)

        return chosen

    return decorate
