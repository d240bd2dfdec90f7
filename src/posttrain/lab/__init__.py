"""The lab: small worlds with exact ground truth and small models pre-trained on them, all made by seed.

`lab.task("tiers")` and `lab.model("tiers")` belong together: the model is right on the task often enough to learn by
trial, and wrong often enough to have something to learn. Wherever a model's id is asked for, `lab:tiers` is this model
and `lab:tiers@3` the one built from seed 3.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from posttrain.lab import worlds
from posttrain.lab.haste import hasty
from posttrain.lab.measuring import Headroom, measure
from posttrain.lab.models import ModelSpec, Share, World, build, folder_of, headroom
from posttrain.lab.presets import PRESETS
from posttrain.lab.worlds import WorldTask
from posttrain.models.causal import CausalPolicy
from posttrain.reward.names import unknown
from posttrain.trajectory import PosttrainError

__all__ = [
    "PRESETS",
    "Headroom",
    "ModelSpec",
    "Share",
    "World",
    "build",
    "hasty",
    "headroom",
    "measure",
    "model",
    "preset",
    "task",
    "worlds",
]


def preset(name: str) -> ModelSpec:
    """The specification of a named model; PosttrainError with the nearest name for an unknown one."""
    if name not in PRESETS:
        raise unknown("model of the lab", name, PRESETS)
    return PRESETS[name]


def model(name: str, seed: int | None = None) -> CausalPolicy:
    """A named model, in fp32 on the CPU: from the cache, or built now (about a minute)."""
    return build(preset(name), seed)


def task(name: str, **options: Any) -> WorldTask:
    """The task that the model of this name has headroom on; `train`, `heldout` and `seed` are the world's own."""
    return preset(name).task.task(**options)


def provide(name: str) -> Path:
    """The folder of the model `lab:name`, or `lab:name@seed`."""
    base, at, seed = name.partition("@")
    if at and not seed.isdigit():
        raise PosttrainError(f"lab:{name}: the seed is {seed!r}; expected a whole number, as in lab:{base}@1")
    spec = preset(base)
    return folder_of(dataclasses.replace(spec, seed=int(seed)) if at else spec)
