"""The lab's models by name, each with the task it has headroom on."""

from __future__ import annotations

import dataclasses

from posttrain.lab.models import ModelSpec, Share, World
from posttrain.lab.worlds.arithmetic import DEFAULT_TIERS


def _tier(name: str, share: float) -> Share:
    return Share(World("arithmetic", {**DEFAULT_TIERS[name], "name": name}), share)


TIERS = ModelSpec(
    name="tiers",
    task=World("tiers"),
    corpus=(_tier("easy", 0.62), _tier("medium", 0.22), _tier("hard", 0.16)),
    until=0.4,
    watch="medium",
)

MOE = dataclasses.replace(TIERS, name="moe", experts=8)

_SUMS = World("arithmetic")
STRONG = ModelSpec("strong", _SUMS, (Share(_SUMS),), steps=700, learning_rate=3e-3, schedule="linear")
WEAK = ModelSpec("weak", _SUMS, (Share(_SUMS),), hidden=64, until=0.3)

_WORKED = World("arithmetic", {"style": "worked"})
WORKING = ModelSpec("working", _WORKED, (Share(_WORKED),), learning_rate=1e-3, until=0.3, check_every=10)

_TERSE = World("styles", {"style": "terse"})
STYLES = ModelSpec("styles", World("styles", {"style": "spaced"}), (Share(_TERSE),), until=0.3)

_WORDS = World("words", {"depth": (1, 3), "operations": "+"})
WORDS = ModelSpec("words", _WORDS, (Share(_WORDS),), rows=6000, batch=32, learning_rate=3e-3, until=0.4)

_LOGIC = World("logic")
LOGIC = ModelSpec("logic", _LOGIC, (Share(_LOGIC),), learning_rate=3e-3, until=0.4)

_FACTS = World("facts")
FACTS = ModelSpec("facts", _FACTS, (Share(_FACTS),), until=0.4)

_FORMATS = World("formats")
FORMATS = ModelSpec("formats", _FORMATS, (Share(_FORMATS),), until=0.4)

_TURNS = World("turns")
TURNS = ModelSpec("turns", _TURNS, (Share(_TURNS),), rows=4000, until=0.3)

_THREE = World("three_tasks")
THREE_TASKS = ModelSpec("three-tasks", _THREE, (Share(_THREE),), until=0.5)

PRESETS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (TIERS, MOE, STRONG, WEAK, WORKING, STYLES, WORDS, LOGIC, FACTS, FORMATS, TURNS, THREE_TASKS)
}
