"""Text of the lab: what a model was trained on, drawn anew; the same from beyond the held-out border; and plain text
of many worlds for models from elsewhere.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from posttrain.lab import worlds
from posttrain.lab.models import ModelSpec, corpus
from posttrain.lab.tokenizer import character_tokenizer
from posttrain.lab.worlds.world import WorldTask
from posttrain.trajectory import Group

FRESH = 100_003  # added to seeds, which are those of the corpora that models are trained on
PLAIN: dict[str, dict[str, Any]] = {
    "arithmetic": {"style": "worked"},
    "words": {"depth": (1, 4), "contexts": ("plain", "zoo", "school", "films")},
    "facts": {"hops": 0.2},
    "logic": {"kinds": ("boolean", "order", "sums")},
    "formats": {},
    "counting": {},
    "rewriting": {},
}


def fresh(spec: ModelSpec, rows: int, seed: int) -> list[Group]:
    """Demonstrations from the worlds of a model's corpus in its shares, drawn by seed and never held out."""
    return corpus(dataclasses.replace(spec, rows=rows, seed=FRESH + seed))


def heldout(spec: ModelSpec, rows: int, seed: int = 0) -> list[Group]:
    """Demonstrations of held-out problems of the same worlds in the same shares; no model of the lab has seen one."""
    total = sum(part.share for part in spec.corpus)
    found: list[Group] = []
    for part in spec.corpus:
        task = part.world.task(train=0, heldout=max(1, round(rows * part.share / total)), seed=seed)
        found += task.demonstrated(task.heldout, character_tokenizer())
    return found


def plain(rows: int = 3000, seed: int = 0) -> list[str]:
    """Problems of many worlds with their solutions, in turn: text for a model that no world of the lab is behind."""
    tasks: list[WorldTask] = [worlds.find(name)(train=0, heldout=0, **options) for name, options in PLAIN.items()]
    columns = [task.corpus(-(-rows // len(tasks)), seed) for task in tasks]
    problems = [item for together in zip(*columns, strict=True) for item in together]
    return [f"{item.question}\n{item.solution}" for item in problems[:rows]]
