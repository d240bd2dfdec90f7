"""Ways to decode: one of them, and from it along each axis one value after the other."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain.reward.names import unknown
from posttrain.trajectory import PosttrainError, Sampling

AXES = ("temperature", "top_k", "top_p", "min_p", "max_tokens")
WHOLE = ("top_k", "max_tokens")  # axes of whole numbers
TEMPERATURES = (0.1, 0.3, 0.5, 0.6, 0.7, 0.8, 1.0)


@dataclass(frozen=True)
class Setting:
    """A point of a grid: the value that one axis has there, and how completions are drawn."""

    axis: str
    value: float
    sampling: Sampling

    def __str__(self) -> str:
        return f"{self.axis} {self.value:g}"


@dataclass(frozen=True)
class DecodingGrid:
    """Values along each axis, while all others are as in `base`: an effect of two that move together has no name.

    axes: pairs of an axis (`temperature`, `top_k`, `top_p`, `min_p`, `max_tokens`) and its values.
    """

    axes: tuple[tuple[str, tuple[float, ...]], ...] = (("temperature", TEMPERATURES),)
    base: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        names = [name for name, _ in self.axes]
        for name, values in self.axes:
            if name not in AXES:
                raise unknown("axis of decoding", name, AXES)
            if len(set(values)) < 2 or len(set(values)) < len(values):
                raise PosttrainError(f"{name} has the values {_listed(values)}; expected at least two, all different")
            if name in WHOLE and any(value != int(value) for value in values):
                raise PosttrainError(f"{name} has the values {_listed(values)}; expected whole numbers")
        if not names or len(set(names)) < len(names):
            raise PosttrainError(f"a grid of decoding along {', '.join(names) or 'nothing'}; expected each axis once")
        _ = self.settings  # which checks every value

    @classmethod
    def of(cls, texts: Sequence[str], base: Sampling) -> DecodingGrid:
        """From texts such as `temperature=0.3,0.7,1`."""
        return cls(tuple(_axis(text) for text in texts), base)

    @property
    def settings(self) -> list[Setting]:
        return [self._setting(axis, value) for axis, values in self.axes for value in values]

    def _setting(self, axis: str, value: float) -> Setting:
        moved: dict[str, Any] = {axis: int(value) if axis in WHOLE else value}
        return Setting(axis, value, dataclasses.replace(self.base, **moved))

    def places(self, axis: str) -> list[int]:
        """Where the settings of an axis stand among all."""
        return [i for i, setting in enumerate(self.settings) if setting.axis == axis]


def _axis(text: str) -> tuple[str, tuple[float, ...]]:
    name, equals, values = text.partition("=")
    try:
        found = tuple(float(part) for part in values.split(","))
    except ValueError:
        found = ()
    if not equals or not found:
        raise PosttrainError(f"axis of decoding {text!r}: expected AXIS=VALUE,VALUE..., as in temperature=0.3,0.7,1")
    return name.strip().replace("-", "_"), found


def _listed(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values) or "nothing"
