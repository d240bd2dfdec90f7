"""What an arm is, as text and as a hash: its arguments written out whole, and the code of what they name.

A part's code counts with everything it calls in turn; of the function that runs the arm, the helpers in its own module.
The code is taken without comments, docstrings and layout, so that editing those makes nothing stale. What is written
out is the same in every process. By its name alone counts the code of the standard library and of installed packages,
and of the types that every arm shares (`SHARED`): like the training loop, they are held still by tests of their own.
What quick jobs do instead (`lab.haste`) is left out.
"""

from __future__ import annotations

import ast
import copyreg
import dataclasses
import enum
import functools
import hashlib
import importlib
import inspect
import json
import sys
import sysconfig
import textwrap
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from posttrain.lab.haste import in_haste
from posttrain.models.causal import CausalPolicy
from posttrain.trajectory import PosttrainError

PACKAGE = __name__.partition(".")[0]
INSTALLED = tuple(
    {str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)
SHARED = (
    f"{PACKAGE}.trajectory",
    f"{PACKAGE}.compress.experts",
    f"{PACKAGE}.compress.grids.grid",
    f"{PACKAGE}.compress.method",
    f"{PACKAGE}.compress.moments",
    f"{PACKAGE}.compress.packed.inputs",
    f"{PACKAGE}.compress.packed.linear",
    f"{PACKAGE}.compress.packed.weight",
    f"{PACKAGE}.compress.solvers.solver",
    f"{PACKAGE}.compress.stacks",
    f"{PACKAGE}.compress.walk",
    f"{PACKAGE}.objective.batch",
    f"{PACKAGE}.objective.estimator",
    f"{PACKAGE}.objective.likelihood",
    f"{PACKAGE}.training.method",
    f"{PACKAGE}.training.settings",
)
Code = type | types.FunctionType


def fingerprint(run: Callable[..., object], arguments: Mapping[str, Any], depends: tuple[object, ...] = ()) -> str:
    """32 hexadecimal digits of a hash of a call: function, arguments, and the code of what the arguments name.

    Raises:
        PosttrainError: an argument that no text can stand for, such as an open file.
    """
    return _hash(describe(run, arguments, depends))


def digest(value: Any) -> str:
    """32 hexadecimal digits of a hash of a value, written out whole, and of the code that it names."""
    found = _Reader()
    return _hash([found.value(value), found.sources])


def describe(run: Callable[..., object], arguments: Mapping[str, Any], depends: tuple[object, ...] = ()) -> Any:
    """What `fingerprint` hashes, as JSON: the call, and `sources`, the code by qualified name."""
    found = _Reader()
    call = {"run": _name(run), "arguments": found.value(dict(arguments)), "depends": found.value(depends)}
    for thing in depends:  # which may also be of the types that every arm shares
        if isinstance(thing, type | types.FunctionType):
            found.read(thing, named=True)
    if isinstance(run, types.FunctionType):
        found.read(run, within=run.__module__)
    return {**call, "sources": found.sources}


def _hash(described: Any) -> str:
    return hashlib.blake2b(json.dumps(described, sort_keys=True).encode(), digest_size=16).hexdigest()


class _Reader:
    """Writes values out, and gathers the code they name."""

    def __init__(self) -> None:
        self.sources: dict[str, str] = {}
        self._open: list[int] = []  # ids of the values being written, against cycles

    def value(self, given: Any) -> Any:
        """A value as JSON."""
        if given is None or (isinstance(given, bool | int | float | str) and not isinstance(given, enum.Enum)):
            return given
        if id(given) in self._open:
            return "(itself)"
        self._open.append(id(given))
        try:
            return self._compound(given)
        finally:
            self._open.pop()

    def _compound(self, given: Any) -> Any:
        if isinstance(given, enum.Enum):
            return {"enum": _name(type(given)), "name": given.name}
        if isinstance(given, bytes):
            return {"bytes": given.hex()}
        if isinstance(given, list | tuple):
            return [self.value(item) for item in given]
        if isinstance(given, set | frozenset):
            return {"set": sorted((self.value(item) for item in given), key=json.dumps)}
        if isinstance(given, Mapping):
            pairs = [[self.value(key), self.value(item)] for key, item in given.items()]
            return {"mapping": sorted(pairs, key=lambda pair: json.dumps(pair[0]))}
        if isinstance(given, torch.Tensor):
            raw = given.detach().cpu().contiguous().flatten().view(torch.uint8)
            return self._array(raw.numpy(), given.dtype, given.shape)
        if isinstance(given, CausalPolicy):
            return {"policy": given.name, "weights": self.value(given.model)}
        if isinstance(given, torch.nn.Module):
            self.read(type(given))
            return {"module": _name(type(given)), "weights": self.value(given.state_dict())}
        if isinstance(given, np.ndarray):
            return self._array(given, given.dtype, given.shape)
        if isinstance(given, Path):
            return {"path": str(given)}
        if isinstance(given, types.ModuleType):
            return {"module": given.__name__}
        named = self._callable(given) if callable(given) else None
        return self._object(given) if named is None else named

    @staticmethod
    def _array(values: Any, dtype: object, shape: Any) -> Any:
        digest = hashlib.blake2b(np.ascontiguousarray(values).tobytes(), digest_size=16).hexdigest()
        return {"array": digest, "dtype": str(dtype), "shape": list(shape)}

    def _callable(self, given: Any) -> Any:
        """A class, function, method or partial; None for an object that can be called."""
        if isinstance(given, functools.partial):
            parts = [self.value(part) for part in (given.func, given.args, given.keywords)]
            return {"partial": parts}
        if isinstance(given, types.MethodType):
            return {"method": self.value(given.__func__), "of": self.value(given.__self__)}
        if isinstance(given, types.BuiltinFunctionType):
            return {"builtin": _name(given)}
        if isinstance(given, type):
            self.read(given)
            return {"class": _name(given)}
        if isinstance(given, types.FunctionType):
            self.read(given)
            kept = [cell.cell_contents for cell in inspect.unwrap(given).__closure__ or ()]
            return {"function": _name(given), "keeps": self.value([*kept, given.__defaults__, given.__kwdefaults__])}
        return None

    def _object(self, given: Any) -> Any:
        """An object by its class and its state."""
        kind = type(given)
        self.read(kind)
        if dataclasses.is_dataclass(given):
            kept = [f for f in dataclasses.fields(given) if f.compare]  # the others are caches
            state = {f.name: getattr(given, f.name, None) for f in kept}
            for f in kept:  # one that came later, and has its default, leaves what was found before as it is
                if f.metadata.get("later") and state[f.name] == f.default:
                    del state[f.name]
            return {"object": _name(kind), "state": self.value(state)}
        try:
            reducer = copyreg.dispatch_table.get(kind)
            reduced = given.__reduce_ex__(4) if reducer is None else reducer(given)  # what pickle would keep
        except TypeError as error:
            raise PosttrainError(
                f"an arm's arguments hold {given!r}, which has no lasting description ({error}); pass what it is made "
                f"of, and make it where the arm runs"
            ) from None
        if not isinstance(reduced, str):
            reduced = [list(part) if isinstance(part, Iterator) else part for part in reduced]
        return {"object": _name(kind), "made": self.value(reduced)}

    def read(self, thing: Any, within: str | None = None, *, named: bool = False) -> None:
        """Gather the code of a class or function and of all it names; `within` one module where that is given.

        named: it was named for its code, wherever that lies.
        """
        thing = inspect.unwrap(thing)
        name = _name(thing)
        if name in self.sources or not (named or _ours(thing)):
            return
        if within is not None and thing.__module__ != within:
            return
        text, tree = _source(thing)
        self.sources[name] = text
        for found in _referenced(thing, tree, imports=within is None):
            if isinstance(found, type | types.FunctionType):
                self.read(found, within)
        for label, constant in _constants(thing, tree):
            self.sources[label] = constant


def _name(thing: Any) -> str:
    thing = inspect.unwrap(thing) if callable(thing) else thing
    return f"{getattr(thing, '__module__', '')}:{getattr(thing, '__qualname__', type(thing).__qualname__)}"


def _ours(thing: Any) -> bool:
    """Whether its code belongs to posttrain or to the user, rather than to Python or an installed package."""
    return isinstance(thing, type | types.FunctionType) and _followed(thing.__module__)


@functools.cache
def _followed(module: str) -> bool:
    if module.partition(".")[0] == PACKAGE:
        return module not in SHARED
    file = getattr(sys.modules.get(module), "__file__", None)
    return file is not None and not str(Path(file).resolve()).startswith(INSTALLED)


@functools.cache
def _source(thing: Code) -> tuple[str, ast.AST | None]:
    """The code without comments, docstrings and layout, and its tree; that of a lambda is its bytecode."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(thing)))
    except (OSError, TypeError, SyntaxError):
        tree = None  # typed at a prompt, made at run time, or a lambda inside of an expression
    if tree is None or (isinstance(thing, types.FunctionType) and thing.__name__ == "<lambda>"):
        functions = vars(thing).values() if isinstance(thing, type) else (thing,)
        codes = [code for f in functions if isinstance(f, types.FunctionType) for code in _codes(f.__code__)]
        return json.dumps([[c.co_code.hex(), list(c.co_names), _plain(c.co_consts)] for c in codes]), None
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = [d for d in node.decorator_list if not _is_of_haste(d)]
    return ast.unparse(tree), tree


def _is_of_haste(decorator: ast.expr) -> bool:
    return isinstance(decorator, ast.Call) and ast.unparse(decorator.func).rpartition(".")[2] == in_haste.__name__


def _codes(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from _codes(inner)


def _plain(constants: tuple[Any, ...]) -> list[str]:
    return [repr(c) for c in constants if not isinstance(c, types.CodeType)]


def _referenced(thing: Code, tree: ast.AST | None, *, imports: bool) -> Iterator[object]:
    """What the code names among the globals of its module, through modules, and by imports of its own."""
    scope = _globals(thing)
    if tree is None:
        functions = vars(thing).values() if isinstance(thing, type) else (thing,)
        for function in functions:
            if isinstance(function, types.FunctionType):
                names = {name for code in _codes(function.__code__) for name in code.co_names}
                yield from (scope[name] for name in names if name in scope)
        return
    for node in _without_annotations(tree):
        if isinstance(node, ast.Name) and node.id in scope:
            yield scope[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = scope.get(node.value.id)
            if isinstance(module, types.ModuleType) and _followed(module.__name__):
                yield getattr(module, node.attr, None)
        elif isinstance(node, ast.ImportFrom) and imports and (node.module or "").partition(".")[0] == PACKAGE:
            module = importlib.import_module(str(node.module))
            yield from (getattr(module, alias.name, None) for alias in node.names)


def _constants(thing: Code, tree: ast.AST | None) -> Iterator[tuple[str, str]]:
    """Constants of the module that the code names, where they are plain values."""
    scope = _globals(thing)
    for node in _without_annotations(tree) if tree is not None else ():
        if isinstance(node, ast.Name) and node.id in scope and _is_plain(scope[node.id]):
            yield f"{thing.__module__}:{node.id}", repr(scope[node.id])


def _globals(thing: Code) -> Mapping[str, Any]:
    return thing.__globals__ if isinstance(thing, types.FunctionType) else vars(sys.modules[thing.__module__])


def _is_plain(value: object) -> bool:
    if isinstance(value, tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)


def _without_annotations(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those of annotations, which name types and compute nothing."""
    for name, child in ast.iter_fields(tree):
        if name in ("annotation", "returns"):
            continue
        for node in child if isinstance(child, list) else [child]:
            if isinstance(node, ast.AST):
                yield node
                yield from _without_annotations(node)
