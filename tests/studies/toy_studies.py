"""Studies whose arms are pure functions, for the tests of everything around arms."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from posttrain.studies.registry import study
from posttrain.studies.study import Arm, Measured, Study
from posttrain.studies.verdict import AtLeast, Better


@dataclass(frozen=True)
class Slope:
    """A part: what a step adds."""

    rise: float

    def __call__(self, step: int) -> float:
        return self.rise * step


def climb(seed: int, quick: bool, slope: Slope, steps: int = 4) -> Measured:
    steps = 2 if quick else steps
    points = [{"step": i, "value": slope(i) + 0.01 * seed, "tokens": 10 * i} for i in range(steps + 1)]
    return Measured({"height": points[-1]["value"]}, {"height": points}, rollouts=8 * steps, seconds=2.0, tokens=40)


def stumble(seed: int, quick: bool, how: str, log: str = "") -> Measured:
    """Fails or waits at seed 1; `log` is a folder where every call leaves a file with its process id."""
    if log:
        (Path(log) / f"{how}-{seed}-{os.getpid()}").touch()
    if seed == 1 and how == "raise":
        raise ValueError("the ground\nis gone")
    if seed == 1 and how == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "wait":
        time.sleep(float(os.environ.get("TOY_WAIT", "600")) if seed else 0)
    return Measured({"height": 1.0})


@study(method="grpo", card="046")
def toy_climb() -> Study:
    """A steeper slope leads higher.

    That is what slopes do. Reference: On slopes, 1999,
    arXiv 9901.00001.
    """
    return Study(
        claim="A steeper slope leads higher.",
        setting="Walking four steps up a line.",
        arms={"flat": Arm(climb, {"slope": Slope(0.0)}), "steep": Arm(climb, {"slope": Slope(1.0)})},
        expectations=(Better("steep", than="flat", metric="height", margin=0.5, why="that is a slope"),),
        notes="Nothing was tuned.",
    )


@study(method=("nothing", "grpo"), card=("046", "030"), name="toy-same")
def _another() -> Study:
    """The steep arm of the other study, shared."""
    return Study(
        claim="A slope leads up.",
        setting="As before.",
        arms={"up": Arm(climb, {"slope": Slope(1.0)})},
        expectations=(AtLeast("up", "height", 10.0),),
    )


def stumbling(how: str, log: str = "") -> Study:
    arms = {how: Arm(stumble, {"how": how, "log": log}), "walk": Arm(stumble, {"how": "walk", "log": log})}
    return Study("It gets there.", "Walking.", arms, (AtLeast("walk", "height", 0.5),))


@study(method="grpo", card="046")
def toy_raise() -> Study:
    """One arm raises."""
    return stumbling("raise", os.environ.get("TOY_LOG", ""))


@study(method="grpo", card="046")
def toy_die() -> Study:
    """The process of one arm dies."""
    return stumbling("die")


@study(method="grpo", card="046")
def toy_wait() -> Study:
    """One arm takes its time."""
    return stumbling("wait", os.environ.get("TOY_LOG", ""))
