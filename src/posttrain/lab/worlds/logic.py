"""Logic and constraint puzzles, some with many right answers.

boolean   T&F,F|T,!F           FTT     the value of each expression
order     c>a,a>b              cab     from the largest to the smallest
sums      x+y=12,x<8           57      digits with that sum, under a condition or two; many are right
colours   ab,ac,cd,bc,ce,df    rgbrgb  a colour of r, g, b for each node, neighbours differ; many are right
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Literal, get_args

from posttrain.evaluation.task import TaskItem
from posttrain.lab.worlds.mixture import mix
from posttrain.lab.worlds.world import WorldTask, world_task
from posttrain.reward.reward import Reward
from posttrain.reward.verifiers import ExactMatch
from posttrain.trajectory import PosttrainError

Kind = Literal["boolean", "order", "sums", "colours"]
_DIGITS = {size: list(product(range(10), repeat=size)) for size in (2, 3)}


def logic(
    *,
    kinds: Sequence[Kind] = ("sums", "colours"),
    size: int | None = None,
    train: int = 600,
    heldout: int = 160,
    seed: int = 0,
    name: str = "logic",
) -> WorldTask:
    """Puzzles of the given kinds in equal parts; `meta["domain"]` names the kind.

    The reference answer of a problem is the tuple of all its right answers, the solution one of them at random.

    Args:
        kinds: out of boolean, order, sums, colours; the last two have many right answers.
        size: expressions, letters, digits (2 or 3) or nodes of a puzzle: 3, 5, 2 and 6 by default.

    `meta`: domain, answers (how many are right).
    """
    for kind in kinds:
        if kind not in get_args(Kind):
            raise PosttrainError(f"logic: kind {kind!r} is unknown; expected some of {', '.join(get_args(Kind))}")
    if not kinds or (size is not None and not 2 <= size <= 8):
        raise PosttrainError(
            f"logic: kinds is {kinds!r}, size {size}; expected at least one kind and a size from 2 to 8"
        )
    sizes = {"train": train // len(kinds), "heldout": heldout // len(kinds)}
    return mix({kind: _puzzles(kind, size, **sizes, seed=seed) for kind in kinds}, name=name, seed=seed)


def _puzzles(kind: Kind, size: int | None, *, train: int, heldout: int, seed: int) -> WorldTask:
    make, usual = _MAKERS[kind]
    many = size or usual

    def draw(chance: random.Random) -> TaskItem:
        prompt, answers = make(chance, many)
        return TaskItem(prompt, answers, {"domain": kind, "answers": len(answers)}, chance.choice(answers))

    return world_task(
        kind,
        draw,
        Reward({"answer": (ExactMatch(normalise_numbers=False), 1.0)}),
        train=train,
        heldout=heldout,
        seed=seed,
        max_tokens=many + 2,
        description=f"{kind} of size {many}",
    )


def _boolean(chance: random.Random, size: int) -> tuple[str, tuple[str, ...]]:
    expressions, values = [], ""
    for _ in range(size):
        left, right, operator = chance.choice("TF"), chance.choice("TF"), chance.choice("&|^!")
        expressions.append(f"!{left}" if operator == "!" else f"{left}{operator}{right}")
        a, b = left == "T", right == "T"
        values += "T" if {"&": a and b, "|": a or b, "^": a != b, "!": not a}[operator] else "F"
    return ",".join(expressions), (values,)


def _order(chance: random.Random, size: int) -> tuple[str, tuple[str, ...]]:
    letters = chance.sample("abcdefgh", size)
    facts = [f"{a}>{b}" if chance.random() < 0.5 else f"{b}<{a}" for a, b in pairwise(letters)]
    chance.shuffle(facts)
    return ",".join(facts), ("".join(letters),)


def _sums(chance: random.Random, size: int) -> tuple[str, tuple[str, ...]]:
    """A total of two or three digits and one or two conditions that some digits meet."""
    if size not in _DIGITS:
        raise PosttrainError(f"logic: sums have 2 or 3 digits; got size {size}")
    while True:
        total = sum(chance.choice(_DIGITS[size]))
        conditions = [_condition(chance, place, size) for place in chance.sample(range(size), chance.randint(1, 2))]
        fitting = (d for d in _DIGITS[size] if sum(d) == total and all(c.meets(d) for c in conditions))
        found = tuple("".join(map(str, digits)) for digits in fitting)
        if found:
            return f"{'+'.join('xyz'[:size])}={total},{','.join(map(str, conditions))}", found


@dataclass(frozen=True)
class _Condition:
    """The digit at `place` is less or greater (`sign`) than that at `other`, or than `bound` where `other` is None."""

    place: int
    sign: str
    other: int | None
    bound: int

    def __str__(self) -> str:
        return f"{'xyz'[self.place]}{self.sign}{self.bound if self.other is None else 'xyz'[self.other]}"

    def meets(self, digits: Sequence[int]) -> bool:
        limit = self.bound if self.other is None else digits[self.other]
        return digits[self.place] < limit if self.sign == "<" else digits[self.place] > limit


def _condition(chance: random.Random, place: int, size: int) -> _Condition:
    other = chance.choice([p for p in range(size) if p != place]) if chance.random() < 0.5 else None
    return _Condition(place, chance.choice("<>"), other, chance.randint(2, 8))


def _colours(chance: random.Random, size: int) -> tuple[str, tuple[str, ...]]:
    """A connected graph that three colours suffice for."""
    nodes = range(size)
    while True:
        edges = {(chance.randrange(j), j) for j in range(1, size)}
        for _ in range(chance.randint(0, size // 2)):
            a, b = sorted(chance.sample(nodes, 2))
            edges.add((a, b))
        found = tuple("".join(c) for c in product("rgb", repeat=size) if all(c[a] != c[b] for a, b in edges))
        if found:
            return ",".join(f"{'abcdefgh'[a]}{'abcdefgh'[b]}" for a, b in sorted(edges, key=lambda e: e[::-1])), found


Maker = Callable[[random.Random, int], tuple[str, tuple[str, ...]]]
_MAKERS: dict[Kind, tuple[Maker, int]] = {
    "boolean": (_boolean, 3),
    "order": (_order, 5),
    "sums": (_sums, 2),
    "colours": (_colours, 6),
}
