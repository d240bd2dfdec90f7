"""The taxonomy of post-training: where each card and each method stands. The branches are data, in `taxonomy.yaml`.

Reference: A Survey on Post-training of Large Language Models, 2025, arXiv 2503.06072 (card 026).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files

import yaml


@dataclass(frozen=True, slots=True)
class Branch:
    """A place in the tree. families: which methods may stand there; cards: the papers whose place it is, three digits
    each. tag: set where it is no place but a property that things of several places have.
    """

    id: str
    name: str
    parent: str | None = None
    families: tuple[str, ...] = ()
    cards: tuple[str, ...] = ()
    tag: str | None = None


@dataclass(frozen=True, slots=True)
class Taxonomy:
    """branches: by id, in the order of the tree. home: the branch where a family's methods stand by default."""

    branches: dict[str, Branch]
    home: dict[str, str]

    def children(self, parent: str | None) -> list[Branch]:
        """The branches right below one; those at the top for None."""
        return [branch for branch in self.branches.values() if branch.parent == parent]

    def below(self, branch: str) -> list[Branch]:
        """The branch itself and all below it."""
        return [self.branches[branch], *(b for child in self.children(branch) for b in self.below(child.id))]

    def holds(self, branch: Branch) -> bool:
        """Whether methods can stand right there: a branch that only joins others, or a tag, holds none."""
        return branch.tag is None and bool(branch.families or not self.children(branch.id))

    def of_card(self, card: str) -> Branch | None:
        """The one branch of a card; None for what is no paper (card 000)."""
        return next((b for b in self.branches.values() if b.tag is None and card in b.cards), None)

    def place(self, family: str, cards: Sequence[str]) -> str | None:
        """Where a method of a family stands: the branch of its first card, if the family may stand there, else the
        family's home; None for a family that the taxonomy does not know.
        """
        own = self.of_card(cards[0]) if cards else None
        return own.id if own is not None and family in own.families else self.home.get(family)


@functools.cache
def taxonomy() -> Taxonomy:
    """The tree as the package ships it."""
    read = yaml.safe_load((files("posttrain") / "methods" / "taxonomy.yaml").read_text(encoding="utf-8"))
    branches = [
        Branch(
            row["id"],
            row["name"],
            row.get("parent"),
            tuple(row.get("families", ())),
            tuple(row.get("cards", "").split()),
            row.get("tag"),
        )
        for row in read["branches"]
    ]
    return Taxonomy({branch.id: branch for branch in branches}, read["home"])
