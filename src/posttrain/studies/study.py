"""What a study is: a claim, the arms that are run, and what is expected of them. And what running an arm gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from posttrain.studies.fingerprint import digest, fingerprint
from posttrain.studies.verdict import Expectation
from posttrain.trajectory import PosttrainError

SEEDS = 3  # the fewest from which an interval over seeds says anything
Curve = list[dict[str, float]]


@dataclass(slots=True)
class Measured:
    """What one run of an arm found.

    figures: what the expectations speak of, by name; shares in [0, 1].
    curves: by name, the points of a curve in order: `step` and `value`, and where they are known `seconds`, `tokens`
        and `rollouts` since the start.
    rollouts: completions sampled in training; tokens: model tokens trained on; seconds: of training, without the
        measuring.
    """

    figures: dict[str, float]
    curves: dict[str, Curve] = field(default_factory=dict)
    rollouts: int = 0
    seconds: float = 0.0
    tokens: int = 0


@dataclass(frozen=True)
class Arm:
    """One side of an experiment.

    run: a function of a module, `(seed, quick, **arguments) -> Measured`. Its result depends on its arguments alone;
        what is random in it is made of `seed`, and `quick` asks for the smallest run that still fills every figure.
    arguments: what distinguishes this arm. Arms with equal arguments are run once, whichever studies they stand in.
    depends: functions and classes, beside those in the arguments, whose code the result depends on.
    """

    run: Callable[..., Measured]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    depends: tuple[object, ...] = ()

    @property
    def identity(self) -> str:
        """32 hexadecimal digits: changes with the arguments and with the code of their parts."""
        return fingerprint(self.run, self.arguments, self.depends)


def job_key(identity: str, seed: int, quick: bool = False) -> str:
    """32 hexadecimal digits for one run of the arm of that identity."""
    return digest([identity, seed, quick])


@dataclass(frozen=True)
class Study:
    """A controlled experiment.

    claim: what the paper says, in one sentence. setting: what is run, in words: model, task, sizes, budget.
    arms: by name. Every arm has the same budget, and a baseline is tuned as much as the method.
    expectations: the claim in numbers, fixed before the run (see `verdict`).
    seeds: how many, at least 3. notes: what a reader of the result must know, what was tried.
    """

    claim: str
    setting: str
    arms: Mapping[str, Arm]
    expectations: tuple[Expectation, ...]
    seeds: int = SEEDS
    notes: str = ""

    def __post_init__(self) -> None:
        if self.seeds < SEEDS:
            raise PosttrainError(f"a study has {self.seeds} seeds; expected at least {SEEDS}")
        if not self.arms or not self.expectations:
            raise PosttrainError("a study needs arms and expectations; a claim that nothing is expected of is no claim")
        for expectation in self.expectations:
            for arm in expectation.arms:
                if arm not in self.arms:
                    raise PosttrainError(f"{expectation} speaks of an arm {arm!r}; the arms are {', '.join(self.arms)}")
