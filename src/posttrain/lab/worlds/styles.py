"""The same sums in two surface styles, so that an expert's way of writing can differ from the model's own."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, get_args

from posttrain.lab.worlds.arithmetic import Style, arithmetic, style_of
from posttrain.lab.worlds.world import WorldTask
from posttrain.reward.reward import Reward
from posttrain.trajectory import Finish, Prompt


@dataclass(frozen=True)
class InStyle:
    """1 where a completion is written in the style, right or wrong, else 0."""

    style: Style

    def __call__(self, completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
        return float(style_of(completion) == self.style)


def styles(*, style: Style = "spaced", name: str = "styles", **options: Any) -> WorldTask:
    """Arithmetic whose demonstrations are in `style` and whose verifier accepts every style.

    Beside `answer` (and `process`) stand a component for each style, of weight 0: `terse`, `spaced` and `worked` say
    which one a completion is in. Completions may be as long as the longest style. options: those of `arithmetic`.
    """
    task = arithmetic(style=style, name=name, **options)
    shown = {other: (InStyle(other), 0.0) for other in get_args(Style)}
    longest = arithmetic(style="worked", **{**options, "train": 0, "heldout": 0}).sampling.max_tokens
    return replace(
        task,
        reward=Reward({**task.reward.components, **shown}),
        sampling=replace(task.sampling, max_tokens=longest),
    )
