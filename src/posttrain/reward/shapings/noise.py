"""Rewards that are wrong at random: an experiment's injected noise.

Reference: The Climb Carves Wisdom Deeper Than the Summit, 2025, arXiv 2505.22653 (card 079).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from posttrain.rollout.context import StepContext
from posttrain.trajectory import Group, PosttrainError


@dataclass(frozen=True)
class NoisyReward:
    """Turns rewards r in [0, 1] into 1 - r with probability `p`: on average p + (1 - 2p) r.

    per: `prompt` flips all completions of a prompt together (one coin a group and step, so that a prompt may be flipped
    in one epoch and not in the next), `rollout` each by its own coin.

    The clean reward stays as the fact and the metric `clean_reward`; the metric `flipped` is the share of flips.
    """

    p: float = 0.4
    per: Literal["prompt", "rollout"] = "prompt"

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1 or self.per not in ("prompt", "rollout"):
            raise PosttrainError(
                f"noise: p is {self.p!r} and per {self.per!r}; expected a probability, and prompt or rollout"
            )

    def __call__(self, groups: Sequence[Group], context: StepContext) -> None:
        chance = context.random("noise")
        flips: list[bool] = []
        clean: list[float] = []
        for group in groups:
            coins = chance.random(len(group) if self.per == "rollout" else 1) < self.p
            coins = coins if self.per == "rollout" else coins.repeat(len(group))
            for trajectory, flip in zip(group.trajectories, coins.tolist(), strict=True):
                if not 0 <= trajectory.reward <= 1:
                    raise PosttrainError(
                        f"noise flips rewards between 0 and 1; a completion has {trajectory.reward:g}: "
                        f"give the task's components weights that sum to 1"
                    )
                flips.append(flip)
                clean.append(trajectory.reward)
                trajectory.facts["clean_reward"] = trajectory.reward
                trajectory.reward = 1 - trajectory.reward if flip else trajectory.reward
        context.metrics["clean_reward"] = sum(clean) / len(clean)
        context.metrics["flipped"] = sum(flips) / len(flips)
