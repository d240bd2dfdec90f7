"""Sampling in rounds: prompts are sampled until they have enough signal, then a small balanced group is taken.

Prompts that reach the exit condition are retired (successive elimination), so the budget goes to those that have not.
Each trajectory keeps what became of everything drawn for its prompt as facts: `pool_mean`, the share that was right,
and `pool_size`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from posttrain.rollout.context import StepContext
from posttrain.trajectory import Group, PosttrainError, Prompt, Trajectory

Exit = Literal["balance", "positive", "never"]


@dataclass(frozen=True)
class UntilDecided:
    """Rounds of sampling on the prompts that are not decided yet, then a group of `context.group` (Reinforce-Ada,
    2025, arXiv 2510.04996, card 128).

    rounds: at most so many. samples: completions a prompt and round.
    exit: a prompt is retired after the round in which it has, of everything drawn for it, half a group of right and
        half a group of wrong completions (`balance`), or one right completion (`positive`).
    threshold: a completion is right where its reward exceeds this.
    """

    rounds: int = 4
    samples: int = 8
    exit: Exit = "balance"
    threshold: float = 0.7

    def __call__(self, prompts: Sequence[Prompt], context: StepContext) -> list[Group]:
        size = context.group
        if self.rounds * self.samples < size:
            raise PosttrainError(
                f"{self.rounds} rounds of {self.samples} samples cannot fill a group of {size}; raise rounds or samples"
            )
        pools: list[list[Trajectory]] = [[] for _ in prompts]
        active = list(range(len(prompts)))
        for _ in range(self.rounds):
            drawn = context.draw([prompts[i] for i in active], self.samples)
            for i, group in zip(active, drawn, strict=True):
                pools[i] += group.trajectories
            active = [i for i in active if not self.decided(pools[i], size)]
            if not active:
                break
        first = [t.reward for pool in pools for t in pool[: self.samples]]
        context.metrics |= {
            "reward": sum(first) / len(first),  # where every prompt has as many samples; what is selected is balanced
            "samples_per_prompt": sum(map(len, pools)) / len(pools),
            "unresolved": len(active) / len(pools),
            "one_sided_pools": sum(self._right(pool) in (0, len(pool)) for pool in pools) / len(pools),
        }
        return [Group(self.select(pool, size), prompt) for pool, prompt in zip(pools, prompts, strict=True)]

    def decided(self, pool: Sequence[Trajectory], size: int) -> bool:
        """Whether a prompt with these completions is done."""
        right = self._right(pool)
        if self.exit == "positive":
            return right >= 1
        return self.exit == "balance" and 2 * right >= size and 2 * (len(pool) - right) >= size

    def select(self, pool: Sequence[Trajectory], size: int) -> list[Trajectory]:
        """The first right ones, up to half of `size`, then wrong ones; a side that is short is filled from the other.

        Never by length or reward: the order of sampling is the only one without a bias of its own.
        """
        right = [t for t in pool if t.reward > self.threshold]
        wrong = [t for t in pool if not t.reward > self.threshold]
        half = min(size // 2, len(right))
        taken = [*right[:half], *wrong[: size - half]]
        taken += right[half : half + size - len(taken)]
        for trajectory in taken:
            # a pool of one has nothing to compare with
            trajectory.facts["pool_mean"] = len(right) / len(pool) if len(pool) > 1 else 0.0
            trajectory.facts["pool_size"] = float(len(pool))
        return taken

    def _right(self, pool: Sequence[Trajectory]) -> int:
        return sum(t.reward > self.threshold for t in pool)
