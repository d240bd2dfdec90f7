"""The catalogue as a tree: the branches of the taxonomy, the methods under each, and which are empty."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from posttrain.cli.table import print_table
from posttrain.methods.taxonomy import Branch, taxonomy

if TYPE_CHECKING:
    from rich.tree import Tree

    from posttrain.methods.registry import Entry

ELSEWHERE = Branch("?", "In no branch")


@dataclass(frozen=True, slots=True)
class Node:
    """A branch, the methods that stand right there, and the branches below it."""

    branch: Branch
    entries: tuple[Entry, ...] = ()
    below: tuple[Node, ...] = field(default=())

    @property
    def label(self) -> str:
        branch = self.branch
        name = f"{branch.id} {branch.name}"
        if branch.tag is not None:
            return f"{name}: a tag ({branch.tag}), no place; on cards {', '.join(branch.cards)}"
        if not taxonomy().holds(branch):
            return name
        cards = _count(len(branch.cards), "card")
        return f"{name}: {cards}, {_count(len(self.entries), 'method') if self.entries else 'empty'}"

    @property
    def methods(self) -> list[str]:
        """A line a method."""
        width = max((len(entry.name) for entry in self.entries), default=0)
        return [f"{entry.name:<{width}}  {entry.summary}" for entry in self.entries]

    def walk(self, depth: int = 0) -> Iterator[tuple[int, Node]]:
        yield depth, self
        for node in self.below:
            yield from node.walk(depth + 1)


def nodes(entries: list[Entry], family: str | None = None) -> list[Node]:
    """The tree with these methods in it; of a family, only the branches where its methods may stand or do."""
    made = [node for branch in taxonomy().children(None) if (node := _node(branch, entries, family)) is not None]
    lost = tuple(entry for entry in entries if entry.branch is None)
    return [*made, Node(ELSEWHERE, lost)] if lost else made


def gaps(entries: list[Entry], family: str | None = None) -> list[Branch]:
    """The branches that could hold a method, and hold none."""
    walked = [node for top in nodes(entries, family) for _, node in top.walk()]
    return [node.branch for node in walked if taxonomy().holds(node.branch) and not node.entries]


def print_tree(entries: list[Entry], family: str | None = None) -> None:
    """With lines between the branches on a terminal, indented where it is piped."""
    from rich.console import Console

    console = Console(highlight=False)
    for top in nodes(entries, family):
        if console.is_terminal:
            console.print(_drawn(top))
            continue
        for depth, node in top.walk():
            print("  " * depth + node.label)
            for line in node.methods:
                print("  " * (depth + 1) + line)


def print_gaps(entries: list[Entry], family: str | None = None) -> None:
    """A line a branch, with the cards whose methods it waits for."""
    rows = [(b.id, b.name, ", ".join(b.cards) or "no card") for b in gaps(entries, family)]
    print_table(("empty", "name", "cards"), rows)


def _node(branch: Branch, entries: list[Entry], family: str | None) -> Node | None:
    below = tuple(
        node for child in taxonomy().children(branch.id) if (node := _node(child, entries, family)) is not None
    )
    own = tuple(entry for entry in entries if entry.branch == branch.id)
    wanted = family is None or family in branch.families
    return Node(branch, own, below) if wanted or own or below else None


def _drawn(node: Node) -> Tree:
    from rich.text import Text
    from rich.tree import Tree

    holds = taxonomy().holds(node.branch)
    style = "bold" if node.entries or not holds else "dim"
    tree = Tree(Text(node.label, style=style))
    for line in node.methods:
        tree.add(Text(line))
    for below in node.below:
        tree.children.append(_drawn(below))
    return tree


def _count(number: int, thing: str) -> str:
    return f"no {thing}" if number == 0 else f"{number} {thing}{'s' if number > 1 else ''}"
