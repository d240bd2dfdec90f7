"""What a worker process is asked for and what it answers: plain data, without heavy imports."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.roofline import Group

Side = Literal["ours", "trl", "matrix"]


@dataclass(frozen=True, slots=True)
class Arm:
    """A way to run TRL. weights: dtype of the weights (both compute in bf16 by autocast); checkpointing: of
    activations; rows: sequences computed at a time, 0 for the whole batch.
    """

    weights: Literal["fp32", "bf16"]
    checkpointing: bool = False
    rows: int = 0
    paged: bool = False

    def __str__(self) -> str:
        extra = [
            "checkpointing" if self.checkpointing else "",
            f"{self.rows} rows at a time" if self.rows else "",
            "continuous batching" if self.paged else "",
        ]
        return ", ".join([f"{self.weights} weights", *filter(None, extra)])


@dataclass(frozen=True, slots=True)
class Task:
    """One measurement: `warmup` steps that are not timed, then `steps` that are."""

    side: Side
    model: str
    case: str = ""
    warmup: int = 1
    steps: int = 1
    arm: Arm | None = None


@dataclass(slots=True)
class Step:
    """A finished optimizer step: when it ended (seconds of a monotonic clock), its loss, its sequences, its rewards."""

    ended: float
    loss: float
    groups: list[Group]
    rewards: list[float] = field(default_factory=list)


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
