"""The lab's worlds by name: each a function that returns a task made by seed."""

from __future__ import annotations

from collections.abc import Callable

from posttrain.lab.worlds.arithmetic import arithmetic, tiers
from posttrain.lab.worlds.counting import counting
from posttrain.lab.worlds.facts import facts
from posttrain.lab.worlds.formats import formats
from posttrain.lab.worlds.logic import logic
from posttrain.lab.worlds.mixture import mix
from posttrain.lab.worlds.pages import mixed, pages
from posttrain.lab.worlds.rewriting import rewriting, three_tasks
from posttrain.lab.worlds.styles import styles
from posttrain.lab.worlds.sums import sums
from posttrain.lab.worlds.turns import turns
from posttrain.lab.worlds.words import words
from posttrain.lab.worlds.world import WorldTask
from posttrain.reward.names import unknown

WORLDS: dict[str, Callable[..., WorldTask]] = {
    world.__name__: world
    for world in (
        arithmetic,
        counting,
        facts,
        formats,
        logic,
        mixed,
        pages,
        rewriting,
        styles,
        sums,
        three_tasks,
        tiers,
        turns,
        words,
    )
}
__all__ = ["WORLDS", "WorldTask", "find", "mix", *WORLDS]


def find(name: str) -> Callable[..., WorldTask]:
    """The function of a world; PosttrainError with the nearest name for an unknown one."""
    if name not in WORLDS:
        raise unknown("world", name, WORLDS)
    return WORLDS[name]
