"""The reader of marks, on sources of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
from marked import marked, studied


def write(folder: Path, text: str, name: str = "test_it.py") -> Path:
    (folder / name).write_text(text)
    return folder


def test_marks_of_functions_classes_and_modules(tmp_path: Path) -> None:
    write(tmp_path, """
import pytest
MORE = ("c", "d")
CASES: dict[str, int] = {"e": 1}

@pytest.mark.parametrize("x", [1])
@pytest.mark.limit("a", "b", *MORE)
def test_one(x): ...

@pytest.mark.limit(*CASES)
class TestTwo:
    @pytest.mark.limit("a")
    def test_inside(self): ...

def test_three(): ...
""")  # fmt: skip
    write(tmp_path, "from pytest import mark\npytestmark = [mark.limit('f')]\ndef test_it(): ...", "test_all.py")
    assert marked(tmp_path, "limit") == {
        "a": {"test_it.py::test_one", "test_it.py::test_inside"},
        "b": {"test_it.py::test_one"},
        "c": {"test_it.py::test_one"},
        "d": {"test_it.py::test_one"},
        "e": {"test_it.py::TestTwo"},
        "f": {"test_all.py::test_it"},
    }
    assert marked(tmp_path, "gradient") == {}


@pytest.mark.parametrize(
    "text",
    [
        "@pytest.mark.limit('a')\ndef helper(): ...",
        "CASES = [pytest.param(1, marks=pytest.mark.limit('a'))]\ndef test_it(): ...",
        "limits = pytest.mark.limit('a')\n@limits\ndef test_it(): ...",
    ],
    ids=["no-test", "a-parameter", "a-variable"],
)
def test_a_mark_that_would_be_overlooked_is_an_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(AssertionError, match="1 of its `limit` marks stand on no test"):
        marked(write(tmp_path, text), "limit")


def test_a_module_mark_without_a_test_marks_nothing(tmp_path: Path) -> None:
    assert marked(write(tmp_path, "pytestmark = pytest.mark.limit('a')\ndef helper(): ..."), "limit") == {}


def test_names_that_cannot_be_read_are_an_error(tmp_path: Path) -> None:
    write(tmp_path, "@pytest.mark.limit(*list(CASES))\ndef test_it(): ...")
    with pytest.raises(AssertionError, match=r"test_it.py:1: list\(CASES\) names no method; write the names out"):
        marked(tmp_path, "limit")


def test_studies(tmp_path: Path) -> None:
    write(tmp_path, """
BOTH = ("a", "b")

@study(method="a", card="001")
def first(): ...

@study(card="002", method=BOTH)
def second(): ...

@other(method="c")
def third(): ...
""", "family.py")  # fmt: skip
    assert studied(tmp_path) == {"a": {"family.py::first", "family.py::second"}, "b": {"family.py::second"}}
    assert studied(tmp_path / "nowhere") == {}
