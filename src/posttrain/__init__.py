"""posttrain: post-training of language models on one objective with four interchangeable parts.

`from posttrain import load, train, evaluate, compare, quantize, export, methods, tasks`. Names are imported on first
use, so that importing the package, and `posttrain --help`, stay quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from posttrain.models.providers import PROVIDERS, READERS

if TYPE_CHECKING:
    from posttrain import methods
    from posttrain.api import compare, evaluate, quantize, train
    from posttrain.compress.export.exported import export
    from posttrain.evaluation import tasks
    from posttrain.evaluation.task import Task
    from posttrain.models.load import load
    from posttrain.training.settings import Settings
    from posttrain.trajectory import PosttrainError

__version__ = "0.1.0"
PROVIDERS["lab"] = "posttrain.lab:provide"
READERS["posttrain"] = "posttrain.compress.policy:read"

_WHERE = {
    "PosttrainError": "posttrain.trajectory:PosttrainError",
    "Settings": "posttrain.training.settings:Settings",
    "Task": "posttrain.evaluation.task:Task",
    "compare": "posttrain.api:compare",
    "evaluate": "posttrain.api:evaluate",
    "export": "posttrain.compress.export.exported:export",
    "load": "posttrain.models.load:load",
    "methods": "posttrain.methods",
    "quantize": "posttrain.api:quantize",
    "tasks": "posttrain.evaluation.tasks",
    "train": "posttrain.api:train",
}

__all__ = [
    "PosttrainError",
    "Settings",
    "Task",
    "compare",
    "evaluate",
    "export",
    "load",
    "methods",
    "quantize",
    "tasks",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
