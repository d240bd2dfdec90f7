"""Which methods the tests and studies say they hold to account, read from their source without running any of it.

A test says it by a decorator (`@pytest.mark.limit("sft", "dft")`) or for its whole module (`pytestmark = ...`), a study
by `@study(method=...)`. Names are written out, or stand in a constant of the module (`*COVERED`, `method=COVERED`).
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

Constants = dict[str, ast.expr]


def marked(folder: Path, marker: str) -> dict[str, set[str]]:
    """Method to the tests (`file::test`) that carry the marker for it."""
    found: dict[str, set[str]] = {}
    for file in sorted(folder.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        constants, whole = _constants(tree), 0
        placed = [(test, call) for test in _tests(tree) for call in _marks(test.decorator_list, marker)]
        if "pytestmark" in constants and file.name.startswith("test_"):
            everywhere = list(_marks([constants["pytestmark"]], marker))
            whole = len(everywhere)
            placed += [(test, call) for test in _tests(tree) for call in everywhere]
        own = len([None for test in _tests(tree) for _ in _marks(test.decorator_list, marker)])
        lost = len(list(_marks([tree], marker))) - own - whole
        assert not lost, f"{file}: {lost} of its `{marker}` marks stand on no test"
        for test, call in placed:
            for name in (n for argument in call.args for n in _names(argument, constants, file)):
                found.setdefault(name, set()).add(f"{file.relative_to(folder)}::{test.name}")
    return found


def studied(folder: Path) -> dict[str, set[str]]:
    """Method to the studies (`file::function`) of it."""
    found: dict[str, set[str]] = {}
    for file in sorted(folder.rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        constants = _constants(tree)
        for function in (node for node in tree.body if isinstance(node, ast.FunctionDef)):
            for call in function.decorator_list:
                if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "study":
                    for value in (keyword.value for keyword in call.keywords if keyword.arg == "method"):
                        for name in _names(value, constants, file):
                            found.setdefault(name, set()).add(f"{file.relative_to(folder)}::{function.name}")
    return found


def _tests(tree: ast.Module) -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Test functions and classes of the module, and the test functions of its test classes."""
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            yield node
        elif isinstance(node, ast.ClassDef) and node.name.startswith("Test"):
            yield node
            yield from (n for n in node.body if isinstance(n, ast.FunctionDef) and n.name.startswith("test_"))


def _marks(nodes: list[ast.expr] | list[ast.Module], marker: str) -> Iterator[ast.Call]:
    """Calls of `pytest.mark.MARKER` (or `mark.MARKER`) anywhere in some nodes."""
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == marker:
            owner = node.func.value
            if (owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")) == "mark":
                yield node


def _constants(tree: ast.Module) -> Constants:
    found: Constants = {}
    for node in tree.body:
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value is not None:
            found[node.target.id] = node.value
    return found


def _names(node: ast.expr, constants: Constants, file: Path) -> Iterator[str]:
    """The strings an argument stands for; the keys of a mapping."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.Starred):
        yield from _names(node.value, constants, file)
    elif isinstance(node, ast.Name) and node.id in constants:
        yield from _names(constants[node.id], constants, file)
    elif isinstance(node, ast.Tuple | ast.List | ast.Set | ast.Dict):
        inner = node.keys if isinstance(node, ast.Dict) else node.elts
        yield from (name for each in inner if each is not None for name in _names(each, constants, file))
    else:
        raise AssertionError(f"{file}:{node.lineno}: {ast.unparse(node)} names no method; write the names out")
