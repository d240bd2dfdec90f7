"""Ids of models that are made rather than found: a prefix ("lab" of "lab:tiers"), and the function that makes them.

This room cannot know the rooms above it that make models, so a provider stands here by its import path. The package
itself names its own (`posttrain/__init__.py`); another package may add more.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path

# prefix -> "package.module:function"; the function takes what is behind the colon and returns a `transformers` folder
PROVIDERS: dict[str, str] = {}


def provided(name: str) -> Path | None:
    """The `transformers` folder of a model that a provider makes; None where the id has no provider's prefix."""
    prefix, colon, rest = name.partition(":")
    if not colon or prefix not in PROVIDERS:
        return None
    module, _, function = PROVIDERS[prefix].partition(":")
    make: Callable[[str], Path] = getattr(import_module(module), function)
    return make(rest)
