"""Models made hastily, where a run need only show that it runs: a few steps of training, hardly measured.

`with hasty():` asks for them, of the lab alone and in this context alone: everything called inside of it, in the same
thread, gets them from `cache.kept`. They lie beside the real models under names of their own, which are never looked
up outside; inside, a real model that is there already is taken before one is made hastily.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

SUFFIX = "-hasty"  # behind the name of a folder in the cache
STEPS = 30  # of pre-training, at most
PROBLEMS = 8  # held-out ones that a model is measured on

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
