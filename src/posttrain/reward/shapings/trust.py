r"""A second, learned reward that is trusted only as far as it agrees with the outcome, and less as training goes on.

.. math:: R_i = R^o_i + \gamma\,\alpha\,e^{-s/T} R^t_i,\qquad
          \gamma = \begin{cases} 1 & \mu_c \ge \mu_w\\ e^{\mu_c - \mu_w} & \text{else} \end{cases}

`R^t` scores the thinking in [0, 1]; `μ_c` and `μ_w` are its means over a group's right and wrong completions.
Reference: SophiaVL-R1: Reinforcing MLLMs Reasoning with Thinking Reward, 2025, arXiv 2505.17018 (card 111).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from posttrain.objective.schedule import Coefficient, Exponential, at
from posttrain.reward.reward import Reward, reward_from
from posttrain.reward.scorers import Scorer
from posttrain.rollout.context import StepContext
from posttrain.trajectory import Group, PosttrainError, Trajectory


@dataclass(frozen=True)
class TrustedReward:
    """Adds a thinking reward to the outcome reward, times a trust weight of the group and a schedule.

    thinking: the name of a component of the task's reward (give it weight 0 there, or it counts twice), or a callable
        as verifiers are (a reward model; one that raises scores 0). It is cut to [0, 1], and asked about every
        completion: only where wrong ones are scored too can trust be lost.
    weight: α times the annealing, a number or a schedule. trust: False takes γ = 1.
    right: the outcome from which on a completion is right.
    drop: groups whose outcomes are all at most `low` or all at least `high` get no thinking reward, which a division
        by their standard deviation would blow up.

    Leaves the facts `thinking` and `trust`, and the metrics `thinking`, `trust`, `thinking_margin` (μ_c - μ_w) and
    `thinking_weight`.
    """

    thinking: str | Scorer = "process"
    weight: Coefficient = field(default_factory=lambda: Exponential(0.3))
    trust: bool = True
    right: float = 0.5
    drop: bool = True
    low: float = 0.1
    high: float = 0.9

    def __call__(self, groups: Sequence[Group], context: StepContext) -> None:
        weight = at(self.weight, context)
        judge = None if isinstance(self.thinking, str) else reward_from(self.thinking)
        margins, trusts, scores = [], [], []
        for group in groups:
            outcomes = [t.reward for t in group.trajectories]
            thoughts = [self._thinking(t, group, judge) for t in group.trajectories]
            margin = self.margin(outcomes, thoughts)
            trust = 0.0 if self._dropped(outcomes) else trust_of(margin) if self.trust else 1.0
            for trajectory, thought in zip(group.trajectories, thoughts, strict=True):
                trajectory.facts |= {"thinking": thought, "trust": trust}
                trajectory.reward += trust * weight * thought
            scores += thoughts
            if not self._dropped(outcomes):
                trusts.append(trust)
                margins += [margin] if margin is not None else []
        context.metrics |= {"thinking": sum(scores) / len(scores), "thinking_weight": weight}
        if trusts:
            context.metrics["trust"] = sum(trusts) / len(trusts)
        if margins:
            context.metrics["thinking_margin"] = sum(margins) / len(margins)

    def margin(self, outcomes: Sequence[float], thoughts: Sequence[float]) -> float | None:
        """μ_c - μ_w; None for a group without right or without wrong completions."""
        right = [t for o, t in zip(outcomes, thoughts, strict=True) if o >= self.right - 1e-9]
        wrong = [t for o, t in zip(outcomes, thoughts, strict=True) if o < self.right - 1e-9]
        return sum(right) / len(right) - sum(wrong) / len(wrong) if right and wrong else None

    def _dropped(self, outcomes: Sequence[float]) -> bool:
        return self.drop and (max(outcomes) <= self.low + 1e-9 or min(outcomes) >= self.high - 1e-9)

    def _thinking(self, trajectory: Trajectory, group: Group, judge: Reward | None) -> float:
        if judge is not None:
            assert group.prompt is not None
            value = judge.score(
                group.prompt, trajectory.text, tokens=trajectory.actions, finish=trajectory.finish
            ).total
        elif self.thinking in trajectory.rewards:
            value = trajectory.rewards[str(self.thinking)]
        else:
            raise PosttrainError(
                f"trust-grpo: the reward has no component {self.thinking!r} for the thinking; it has "
                f"{', '.join(trajectory.rewards) or 'none'}; name one of them, or give a callable"
            )
        return min(1.0, max(0.0, value))


def trust_of(margin: float | None) -> float:
    """γ from μ_c - μ_w: 1 unless the wrong completions score higher."""
    return 1.0 if margin is None or margin >= 0 else math.exp(margin)
