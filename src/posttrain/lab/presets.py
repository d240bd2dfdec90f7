"""The lab's models by name, each with the task it has headroom on."""

from __future__ import annotations

import dataclasses
from typing import Any

from posttrain.lab.mamba import MambaSpec
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
STRONG = ModelSpec("strong", _SUMS, (Share(_SUMS),), steps=850, learning_rate=3e-3, schedule="linear")
WEAK = ModelSpec("weak", _SUMS, (Share(_SUMS),), hidden=64, until=0.3)

_WORKED = World("arithmetic", {"style": "worked"})
WORKING = ModelSpec("working", _WORKED, (Share(_WORKED),), learning_rate=1e-3, until=0.3, check_every=10)

_TERSE = World("styles", {"style": "terse"})
STYLES = ModelSpec("styles", World("styles", {"style": "spaced"}), (Share(_TERSE),), until=0.3)

_WORDS = World("words", {"depth": (1, 3), "operations": "+"})
WORDS = ModelSpec("words", _WORDS, (Share(_WORDS),), rows=6000, batch=32, learning_rate=3e-3, until=0.4)

_LOGIC = World("logic")
LOGIC = ModelSpec("logic", _LOGIC, (Share(_LOGIC),), rows=6000, until=0.35)

_FACTS = World("facts")
FACTS = ModelSpec("facts", _FACTS, (Share(_FACTS),), until=0.4)

_FORMATS = World("formats")
FORMATS = ModelSpec("formats", _FORMATS, (Share(_FORMATS),), until=0.4)

_TURNS = World("turns")
TURNS = ModelSpec("turns", _TURNS, (Share(_TURNS),), rows=4000, until=0.3)

# written sums: no carry is known, one has hardly been seen (success about 2 %), two never
CARRYING: dict[str, dict[str, Any]] = {
    name: {"carries": (n, n), "style": "worked"} for n, name in enumerate(("plain", "one", "two"))
}


def _carries(name: str, share: float) -> Share:
    return Share(World("arithmetic", {**CARRYING[name], "name": name}), share)


RARE_CARRIES = ModelSpec(
    name="rare-carries",
    task=World("tiers", {"tiers": CARRYING}),
    corpus=(_carries("plain", 0.85), _carries("one", 0.15)),
    until=0.7,
    watch="plain",
    check_every=25,
)

_TAGS = {"add": 0.67, "rev": 0.16, "srt": 0.17}  # sums take longest to learn
THREE_TASKS = ModelSpec(
    name="three-tasks",
    task=World("three_tasks"),
    corpus=tuple(Share(World("three_tasks", {"only": tag}), share) for tag, share in _TAGS.items()),
    until=0.5,
)

# writes tersely, and has seen a little of the style that the demonstrations are in
_SPACED = World("styles", {"style": "spaced"})
FOREIGN_STYLE = ModelSpec("foreign-style", _SPACED, (Share(_TERSE, 0.85), Share(_SPACED, 0.15)), until=0.3)

_WAYS = World("styles", {"style": "worked"})
TWO_STYLES = ModelSpec("two-styles", _WAYS, (Share(_TERSE, 0.7), Share(_WAYS, 0.3)), until=0.3)

# a language model of pages of text, to be compressed: it predicts well, and its widths divide by usual group sizes
MIXED = ModelSpec(
    name="mixed",
    task=World("mixed"),
    corpus=(Share(World("pages")),),
    hidden=128,
    layers=3,
    rows=5600,
    steps=700,
    batch=16,
    learning_rate=3e-3,
    schedule="linear",
)

MIXED_MOE = dataclasses.replace(MIXED, name="mixed-moe", experts=8)  # nothing makes it use its experts alike

# the same pages, and layers of 96 and 192 columns
MIXED_MAMBA = MambaSpec(
    name="mixed-mamba",
    task=World("mixed"),
    corpus=(Share(World("pages")),),
    hidden=96,
    layers=2,
    rows=5600,
    steps=400,
    batch=16,
    learning_rate=3e-3,
    schedule="linear",
)

PRESETS: dict[str, ModelSpec] = {
    spec.name: spec
    for spec in (
        TIERS,
        MOE,
        STRONG,
        WEAK,
        WORKING,
        STYLES,
        WORDS,
        LOGIC,
        FACTS,
        FORMATS,
        TURNS,
        RARE_CARRIES,
        THREE_TASKS,
        TWO_STYLES,
        FOREIGN_STYLE,
        MIXED,
        MIXED_MOE,
        MIXED_MAMBA,
    )
}
