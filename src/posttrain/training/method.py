"""A method: a choice of parts. A pipeline: methods one after the other (`sft() >> grpo()`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from posttrain.data.sampler import Sampler, Shuffled
from posttrain.objective.estimator import Objective
from posttrain.training.settings import Settings

Data = Literal["demonstrations", "preferences", "feedback", "prompts"]
OBJECTIVE_PARTS = ("advantage", "denominator", "masks", "aggregate", "divergences")


@dataclass(frozen=True)
class Method:
    """What to train on, with which objective, by which defaults.

    data: the rows it needs; `prompts` makes it an online method (rollouts, rewards).
    sampler: makes the sampler of a stage from the number of rows and the seed.
    critic: whether a value head is trained beside the policy.
    arguments: what the method function was called with (for reports).
    """

    name: str
    objective: Objective
    data: Data
    settings: Settings = field(default_factory=Settings)
    sampler: Callable[[int, int], Sampler] = Shuffled
    critic: bool = False
    arguments: dict[str, object] = field(default_factory=dict)

    @property
    def online(self) -> bool:
        return self.data == "prompts"

    def replace(self, **parts: object) -> Method:
        """A copy with other parts; parts of the objective may be given directly (`advantage=...`, `masks=...`)."""
        inner = {k: parts.pop(k) for k in OBJECTIVE_PARTS if k in parts}
        if inner:
            parts["objective"] = self.objective.replace(**inner)
        return replace(self, **parts)  # type: ignore[arg-type]

    def with_settings(self, **settings: object) -> Method:
        """A copy with some settings changed."""
        return replace(self, settings=replace(self.settings, **settings))  # type: ignore[arg-type]

    def __rshift__(self, other: Method | Pipeline) -> Pipeline:
        return Pipeline((self,)) >> other


@dataclass(frozen=True)
class Pipeline:
    """Stages in order; each starts from the weights of the one before."""

    stages: tuple[Method, ...]

    def __rshift__(self, other: Method | Pipeline) -> Pipeline:
        return Pipeline(self.stages + (other.stages if isinstance(other, Pipeline) else (other,)))


def stages_of(method: Method | Pipeline) -> tuple[Method, ...]:
    return method.stages if isinstance(method, Pipeline) else (method,)
