"""posttrain: post-training of language models on one objective with four interchangeable parts.

`from posttrain import load, train, evaluate, methods, tasks`. Names are imported on first use, so that importing the
package, and `posttrain --help`, stay quick.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain import methods
    from posttrain.api import evaluate, train
    from posttrain.evaluate import tasks
    from posttrain.evaluate.evaluation import compare
    from posttrain.evaluate.task import Task
    from posttrain.models.load import load
    from posttrain.train.settings import Settings
    from posttrain.trajectory import PosttrainError

__version__ = "0.1.0"

_WHERE = {
    "PosttrainError": "posttrain.trajectory:PosttrainError",
    "Settings": "posttrain.train.settings:Settings",
    "Task": "posttrain.evaluate.task:Task",
    "compare": "posttrain.evaluate.evaluation:compare",
    "evaluate": "posttrain.api:evaluate",
    "load": "posttrain.models.load:load",
    "methods": "posttrain.methods",
    "tasks": "posttrain.evaluate.tasks",
    "train": "posttrain.api:train",
}

__all__ = ["PosttrainError", "Settings", "Task", "compare", "evaluate", "load", "methods", "tasks", "train"]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'posttrain' has no attribute {name!r}")
    module, _, attribute = _WHERE[name].partition(":")
    found = import_module(module)
    return getattr(found, attribute) if attribute else found


def __dir__() -> list[str]:
    return [*__all__, "__version__"]


class _Room(ModuleType):
    """A room that is called as the function of its name: `posttrain.train(...)` whatever was imported first."""

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return __getattr__(self.__name__.rpartition(".")[2])(*arguments, **options)


class _Package(ModuleType):
    """Importing `posttrain.train.loop` binds the room `train` on the package, where the function is looked for."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and ":" in _WHERE.get(name, ""):
            value.__class__ = _Room
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
