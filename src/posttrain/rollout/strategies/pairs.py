"""Preferences from the policy's own completions: of every group the best against the worst (online DPO and its kin)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from posttrain.rollout.context import StepContext
from posttrain.rollout.strategy import Plain, Strategy
from posttrain.trajectory import Group, PosttrainError, Prompt

TIE = "tie"  # the fact of a pair without a winner


@dataclass(frozen=True)
class BestAgainstWorst:
    """The groups of another strategy as preference pairs, by reward. A group whose rewards are all equal prefers
    nothing and is left out; where all groups are so, one pair stays, with the fact `tie` (see `DropTies`).
    """

    inner: Strategy = field(default_factory=Plain)

    @property
    def demonstrations(self) -> bool:
        return getattr(self.inner, "demonstrations", False)

    @property
    def reference(self) -> bool:
        return getattr(self.inner, "reference", False)

    def __call__(self, prompts: Sequence[Prompt], context: StepContext) -> list[Group]:
        groups = self.inner(prompts, context)
        rewards = [t.reward for group in groups for t in group.trajectories]
        pairs = [pair for group in groups if (pair := best_against_worst(group)) is not None]
        context.metrics |= {"reward": sum(rewards) / len(rewards), "undecided": len(pairs) / len(groups)}
        return pairs or [_tie(groups[0])]

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict() if hasattr(self.inner, "state_dict") else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if hasattr(self.inner, "load_state_dict"):
            self.inner.load_state_dict(state)


def best_against_worst(group: Group) -> Group | None:
    """The first of the best completions as chosen, the first of the worst as rejected; None where all are equal."""
    if len(group) < 2:
        raise PosttrainError("a preference pair needs two completions of a prompt; set group to 2 or more")
    best = max(group.trajectories, key=lambda t: t.reward)
    worst = min(group.trajectories, key=lambda t: t.reward)
    if best.reward - worst.reward <= 1e-9:
        return None
    return Group([replace(best, label="chosen"), replace(worst, label="rejected")], group.prompt)


def _tie(group: Group) -> Group:
    first, second = (replace(t, facts={**t.facts, TIE: 1.0}) for t in group.trajectories[:2])
    return Group([replace(first, label="chosen"), replace(second, label="rejected")], group.prompt)
