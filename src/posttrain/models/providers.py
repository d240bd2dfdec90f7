"""Models that rooms above this one make or read: ids with a prefix ("lab" of "lab:tiers") and the function that makes
them, and folders whose weights are stored in a way that `transformers` does not know.

This room cannot know the rooms above it, so providers and readers stand here by their import paths. The package itself
names its own (`posttrain/__init__.py`); another package may add more.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from posttrain.models.causal import CausalPolicy

    Reader = Callable[[Path, torch.dtype, torch.device, str], CausalPolicy]

# prefix -> "package.module:function"; the function takes what is behind the colon and returns a `transformers` folder
PROVIDERS: dict[str, str] = {}

# `quant_method` of a folder's quantization_config -> "package.module:function"; the function takes the folder, the
# precision, the device and the name of the model, and returns the policy
READERS: dict[str, str] = {}


def provided(name: str) -> Path | None:
    """The `transformers` folder of a model that a provider makes; None where the id has no provider's prefix."""
    prefix, colon, rest = name.partition(":")
    if not colon or prefix not in PROVIDERS:
        return None
    make: Callable[[str], Path] = _imported(PROVIDERS[prefix])
    return make(rest)


def reader(folder: Path) -> Reader | None:
    """What reads a folder whose configuration names a way of storing weights; None where `transformers` reads it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stored = (config.get("quantization_config") or {}).get("quant_method")
    except (OSError, ValueError, AttributeError):
        return None  # what is wrong with it is told when it is loaded
    return _imported(READERS[stored]) if isinstance(stored, str) and stored in READERS else None


def _imported(path: str) -> Any:
    module, _, function = path.partition(":")
    return getattr(import_module(module), function)
