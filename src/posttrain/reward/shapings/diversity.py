r"""Reward for being different: quality times the share of the group that says something else (DARLING).

.. math:: r'_i = r_i \cdot \max(d_i, \text{floor}),\qquad d_i = \frac{n - c_i}{n - 1}

`n` completions of a prompt fall into classes that say the same; `c_i` is the size of completion i's class.
Reference: Jointly Reinforcing Diversity and Quality in Language Model Generations, 2025, arXiv 2509.02534 (card 071).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from posttrain.reward.sameness import Judge, SameText
from posttrain.rollout.context import StepContext
from posttrain.trajectory import Group, PosttrainError


class Measure(Protocol):
    """How different each text is from the others of its group: `[groups][texts]` numbers in [0, 1]."""

    def __call__(self, groups: Sequence[Sequence[str]]) -> list[list[float]]: ...


@dataclass(frozen=True)
class Classes:
    """The share of the other texts that are in another class; 1 for a text that is alone in its group.

    same: judges pairs. Classes are what it connects: where it calls a and b the same, and b and c, all three are one
    class, so that a judge that is too lenient may join everything by a chain of near-duplicates.
    """

    same: Judge = field(default_factory=SameText)

    def __call__(self, groups: Sequence[Sequence[str]]) -> list[list[float]]:
        return [shares_elsewhere(classes) for classes in self.of(groups)]

    def of(self, groups: Sequence[Sequence[str]]) -> list[list[int]]:
        """The class of each text, a number that its group's texts share; the judge is asked once."""
        places = [list(itertools.combinations(range(len(texts)), 2)) for texts in groups]
        asked = [(texts[i], texts[j]) for texts, pairs in zip(groups, places, strict=True) for i, j in pairs]
        answers = iter(self.same(asked))
        found = []
        for texts, pairs in zip(groups, places, strict=True):
            edges = [pair for pair in pairs if next(answers)]
            found.append(connected(len(texts), edges))
        return found


@dataclass(frozen=True)
class RareNgrams:
    """The share of a text's distinct n-grams (of words, or of characters) that no other text of its group has.

    A text too short for a single n-gram is one n-gram of its own.
    """

    n: int = 4
    unit: Literal["words", "characters"] = "words"

    def __call__(self, groups: Sequence[Sequence[str]]) -> list[list[float]]:
        return [self._of(texts) for texts in groups]

    def _of(self, texts: Sequence[str]) -> list[float]:
        grams = [self._grams(text) for text in texts]
        holders = Counter(gram for own in grams for gram in own)
        return [sum(holders[gram] == 1 for gram in own) / len(own) for own in grams]

    def _grams(self, text: str) -> set[tuple[str, ...]]:
        units = text.split() if self.unit == "words" else list(text)
        return {tuple(units[i : i + self.n]) for i in range(max(1, len(units) - self.n + 1))}


@dataclass(frozen=True)
class Diversity:
    """Rewards times (or plus) how different each completion is from the rest of its group.

    measure: how different. floor: the least that it counts (only where it multiplies).
    combine: `multiply`, or `add` (`weight` times the difference), the paper's ablation, which also rewards what is
        different and wrong.
    correct_only: classes are counted among the completions whose reward is at least `correct`; the others get the
        floor. By default wrong answers make a right one look different.
    shift: take the group's lowest reward off first, so that no reward is negative (a negative one, multiplied, would
        reward duplicates).

    Leaves the fact `diversity` (before the floor) and the metric `diversity`.
    """

    measure: Measure = field(default_factory=Classes)
    floor: float = 0.1
    combine: Literal["multiply", "add"] = "multiply"
    weight: float = 1.0
    correct_only: bool = False
    correct: float = 0.5
    shift: bool = False

    def __post_init__(self) -> None:
        if self.combine not in ("multiply", "add"):
            raise PosttrainError(f"diversity: combine is {self.combine!r}; expected multiply or add")

    def __call__(self, groups: Sequence[Group], context: StepContext) -> None:
        counted = [
            [t for t in g.trajectories if not self.correct_only or t.reward >= self.correct - 1e-9] for g in groups
        ]
        measured = self.measure([[t.text for t in members] for members in counted])
        for group, members, values in zip(groups, counted, measured, strict=True):
            own = {id(t): value for t, value in zip(members, values, strict=True)}
            lowest = min(t.reward for t in group.trajectories) if self.shift else 0.0
            for trajectory in group.trajectories:
                different = own.get(id(trajectory), 0.0)
                trajectory.facts["diversity"] = different
                trajectory.reward = self._combined(trajectory.reward - lowest, different)
        every = [t.facts["diversity"] for g in groups for t in g.trajectories]
        context.metrics["diversity"] = sum(every) / len(every)

    def _combined(self, reward: float, different: float) -> float:
        return reward + self.weight * different if self.combine == "add" else reward * max(different, self.floor)


def connected(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """The connected component of each of `count` nodes, named by its lowest node."""
    parent = list(range(count))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for a, b in edges:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return [root(node) for node in range(count)]


def shares_elsewhere(classes: Sequence[int]) -> list[float]:
    """Of each member, the share of the others that are in another class; 1 where there is no other."""
    sizes, others = Counter(classes), len(classes) - 1
    return [(len(classes) - sizes[c]) / others if others else 1.0 for c in classes]
