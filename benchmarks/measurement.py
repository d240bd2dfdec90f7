"""What a worker process is asked for and what it answers: plain data, without heavy imports."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from benchmarks.roofline import Group

Side = Literal["ours", "trl", "matrix", "model"]


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to run TRL.

    weights: their dtype; both compute in bf16 by autocast. checkpointing: of activations. pieces: how many
    micro-batches a step's batch is accumulated over. paged: generate by the continuous batching of `transformers`.
    """

    weights: Literal["fp32", "bf16"]
    checkpointing: bool = False
    pieces: int = 1
    paged: bool = False

    def __str__(self) -> str:
        extra = [
            "checkpointing" if self.checkpointing else "",
            f"{self.pieces} micro-batches" if self.pieces > 1 else "",
            "continuous batching" if self.paged else "",
        ]
        return ", ".join([f"{self.weights} weights", *filter(None, extra)])


@dataclass(frozen=True, slots=True)
class Task:
    """One measurement: `warmup` steps that are not timed, then `steps` that are.

    The side `matrix` measures matrix products, and `model` only sees to it that the model is there.
    """

    side: Side
    model: str
    case: str = ""
    warmup: int = 1
    steps: int = 1
    arm: Arm | None = None

    @classmethod
    def parse(cls, text: str) -> Task:
        """The task that `json` wrote."""
        found = json.loads(text)
        return cls(**{**found, "arm": Arm(**found["arm"]) if found["arm"] else None})

    @property
    def json(self) -> str:
        return json.dumps(asdict(self))


@dataclass(slots=True)
class Step:
    """A finished optimizer step: when it ended (seconds of a monotonic clock), its sequences, their rewards."""

    ended: float
    groups: list[Group]
    rewards: list[float]


@dataclass(slots=True)
class Measurement:
    """A worker's answer. seconds, groups and rewards are of the timed steps; first_loss is that of the very first.

    peak_mib: largest resident memory of the process, loading included.
    """

    seconds: list[float]
    groups: list[list[Group]]
    rewards: list[list[float]]
    first_loss: float
    peak_mib: float
    threads: int
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def mean_seconds(self) -> float:
        """Seconds a step."""
        return sum(self.seconds) / len(self.seconds)

    @property
    def tokens(self) -> int:
        """Tokens of all sequences of the timed steps, prompts counted with each; no padding."""
        return sum(prompt * len(parts) + sum(parts) for step in self.groups for prompt, parts in step)

    @property
    def completion_tokens(self) -> int:
        return sum(sum(parts) for step in self.groups for _, parts in step)

    @property
    def completions(self) -> int:
        return sum(len(parts) for step in self.groups for _, parts in step)
