"""What a raw row is: where it stands (`Origin`), what it holds (`RawRow`), and what is wrong with it (`BadRow`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from posttrain.trajectory import PosttrainError


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row stands.

    name: the file's name, the hub id with its split (`org/id[train]`), or the type of what was given in memory.
    index: number of the row within the source, from 0 (what `rows[index]` gives).
    line: its line in a text file, from 1; None where the source has no lines.
    """

    name: str
    index: int
    line: int | None = None

    def __str__(self) -> str:
        """`train.jsonl:17` counts lines from 1; `org/id[train]:5` and `list[4]` count rows from 0."""
        if self.line is not None:
            return f"{self.name}:{self.line}"
        return f"{self.name}:{self.index}" if self.name.endswith("]") else f"{self.name}[{self.index}]"


class BadRow(PosttrainError):
    """A row that cannot be used.

    category: what is wrong in a word or two, the same for all rows of the kind ("broken JSON", "over-long").
    reason: the category with what was found and what was expected.
    origin: where the row stands; None until a reader named it.
    """

    def __init__(self, category: str, detail: str, origin: Origin | None = None) -> None:
        self.category = category
        self.detail = detail
        self.reason = f"{category}: {detail}"
        self.origin = origin
        super().__init__(self.reason if origin is None else f"{origin}: {self.reason}")

    def at(self, origin: Origin) -> BadRow:
        """The same fault with the place where the row stands."""
        return BadRow(self.category, self.detail, origin)


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row as read: its columns, its place, and the fault that kept it from being read (then `values` is empty)."""

    values: dict[str, Any]
    origin: Origin
    error: BadRow | None = field(default=None)


def describe(value: Any) -> str:
    """What a value is, in words for an error message: `a number (5)`, `text`, `a list`, `null`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"a boolean ({str(value).lower()})"
    if isinstance(value, int | float):
        return f"a number ({value})"
    if isinstance(value, str):
        return "text"
    if isinstance(value, list | tuple):
        return "a list"
    return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"
