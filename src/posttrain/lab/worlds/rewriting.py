"""Rewriting short strings: turned round, or sorted. Three tasks to learn one after the other."""

from __future__ import annotations

import random
from typing import Any, Literal, get_args

from posttrain.evaluation.task import TaskItem
from posttrain.lab.worlds.arithmetic import Range, arithmetic
from posttrain.lab.worlds.mixture import mix
from posttrain.lab.worlds.world import WorldTask, world_task
from posttrain.reward.reward import Reward
from posttrain.reward.verifiers import ExactMatch
from posttrain.trajectory import PosttrainError

Operation = Literal["reverse", "sort"]


def rewriting(
    *,
    operation: Operation = "reverse",
    length: Range = (4, 5),
    alphabet: str = "abcdefgh",
    train: int = 2000,
    heldout: int = 200,
    seed: int = 0,
    name: str = "rewriting",
) -> WorldTask:
    """A string of characters of an alphabet, to be reversed (`bcd` to `dcb`) or sorted (`5281` to `1258`).

    `meta`: domain, length.
    """
    if operation not in get_args(Operation):
        raise PosttrainError(f"rewriting: operation is {operation!r}; expected one of {', '.join(get_args(Operation))}")
    if not 1 <= length[0] <= length[1] or not alphabet:
        raise PosttrainError(
            f"rewriting: length is {length}, alphabet {alphabet!r}; expected a range from 1, and letters"
        )

    def draw(chance: random.Random) -> TaskItem:
        text = "".join(chance.choices(alphabet, k=chance.randint(*length)))
        answer = text[::-1] if operation == "reverse" else "".join(sorted(text))
        return TaskItem(text, answer, {"domain": name, "length": len(text)}, answer)

    return world_task(
        name,
        draw,
        Reward({"answer": (ExactMatch(normalise_numbers=False), 1.0)}),
        train=train,
        heldout=heldout,
        seed=seed,
        max_tokens=length[1] + 2,
        description=f"{operation} strings of {length[0]} to {length[1]} characters",
    )


def three_tasks(*, only: str | None = None, train: int = 1500, heldout: int = 300, seed: int = 0) -> WorldTask:
    """Reverse letters (`rev: dbca`), sort digits (`srt: 5281`) and add two numbers (`add: 46+57`), in equal parts.

    only: the task of one of the tags alone, with all of the problems.
    """
    parts: dict[str, WorldTask] = {}
    wanted = TAGS if only is None else tuple(tag for tag in TAGS if tag == only)
    if not wanted:
        raise PosttrainError(f"three_tasks: only is {only!r}; expected one of {', '.join(TAGS)}")
    for tag in wanted:
        sizes: dict[str, Any] = {"train": train // len(wanted), "heldout": heldout // len(wanted), "seed": seed}
        if tag == "rev":
            parts[tag] = rewriting(operation="reverse", length=(4, 6), name=tag, **sizes)
        elif tag == "srt":
            parts[tag] = rewriting(operation="sort", length=(4, 6), alphabet="0123456789", name=tag, **sizes)
        else:
            parts[tag] = arithmetic(name=tag, **sizes)
    return mix(parts, name="three tasks" if only is None else only, tag=True, seed=seed)


TAGS = ("rev", "srt", "add")
