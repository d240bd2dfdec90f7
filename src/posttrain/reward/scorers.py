"""What scores one answer: a verifier by its name, what an import path leads to, or any callable."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.reward.catalogue import VERIFIERS
from posttrain.reward.fault import Fault
from posttrain.reward.names import unknown
from posttrain.trajectory import Finish, PosttrainError, Prompt

Scorer = Callable[..., float]  # a `verifiers.Verifier`, or any callable that takes (completion, prompt)


class Answer(NamedTuple):
    """One completion to score. tokens: its length, end token included; finish: why it ended."""

    prompt: Prompt
    completion: str
    tokens: int
    finish: Finish


def evaluate(function: Scorer, answer: Answer, keywords: Sequence[str]) -> float | Fault:
    """Call a component; what it raises, or returns in place of a finite number, is a fault."""
    offered = {"tokens": answer.tokens, "finish": answer.finish}
    try:
        return finite_number(function(answer.completion, answer.prompt, **{k: offered[k] for k in keywords}))
    except Exception as error:
        return Fault.of(error)


def keywords_of(name: str, function: Scorer) -> tuple[str, ...]:
    """Which of `tokens` and `finish` the callable takes; raises where it cannot take (completion, prompt)."""
    offered = ("tokens", "finish")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in callables have no signature
        return ()
    parameters = signature.parameters.values()
    anything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    by_name = {p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    keywords = tuple(k for k in offered if anything or k in by_name)
    try:
        signature.bind("completion", None, **dict.fromkeys(keywords))
    except TypeError as error:
        raise PosttrainError(
            f"reward {name}: {error} in {signature}; expected (completion, prompt), tokens and finish optional"
        ) from error
    return keywords


def finite_number(value: Any) -> float:
    """`value` as a finite float; TypeError or ValueError where it is none."""
    if isinstance(value, str | bytes) or value is None:
        raise TypeError(f"returned {value!r}; expected a number")
    number = float(value)
    if not math.isfinite(number):
        raise ValueError(f"returned {number}; expected a finite number")
    return number


def scorer_from(name: str, arguments: dict[str, Any]) -> Scorer:
    """The verifier called `name` with its arguments, or what an import path leads to."""
    if name in VERIFIERS:
        return _construct(name, VERIFIERS[name], arguments)
    if ":" not in name:
        raise unknown("verifier", name, VERIFIERS, where="; your own: package.module:function")
    target = _import(name)
    if inspect.isclass(target):
        return _construct(name, target, arguments)
    if not callable(target):
        raise PosttrainError(f"reward {name}: that is a {type(target).__name__}; expected something callable")
    return functools.partial(target, **arguments) if arguments else target


def _construct(name: str, kind: type, arguments: dict[str, Any]) -> Scorer:
    signature = inspect.signature(kind)
    try:
        signature.bind(**arguments)
        return kind(**arguments)
    except TypeError as error:
        raise PosttrainError(
            f"reward {name}: {error}; its arguments are ({', '.join(map(str, signature.parameters.values()))})"
        ) from error


def _import(path: str) -> Any:
    """The object at "package.module:name" or "folder/file.py:name"; the working folder counts as importable."""
    source, _, attribute = path.rpartition(":")
    try:
        if source.endswith(".py"):
            module = _load_file(Path(source))
        else:
            if str(Path.cwd()) not in sys.path:
                sys.path.append(str(Path.cwd()))
            module = importlib.import_module(source)
        return functools.reduce(getattr, attribute.split("."), module)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise PosttrainError(
            f"reward {path}: cannot import it: {type(error).__name__}: {error}; "
            "expected package.module:function or file.py:function"
        ) from error


def _load_file(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
