r"""A bonus for completions that the group's other completions do not resemble, seen by a frozen model (RepExp).

.. math:: r'_i = r_i + \beta\, b_i,\qquad b_i = v_i^\top \Big(\lambda I + \sum_j v_j v_j^\top\Big)^{-1} v_i

`v_i` is the mean hidden state of completion i under the stage's first policy, projected at random and centred in its
group (see `rollout/novelty.py`).
Reference: Representation-Based Exploration for Language Models, 2025, arXiv 2510.11686 (card 135).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from posttrain.models.representation import mean_hidden
from posttrain.rollout.context import StepContext
from posttrain.rollout.novelty import elliptical_bonus, sparse_projection
from posttrain.trajectory import Group, PosttrainError

ROUNDING = 1e-10  # a spread of states below this share of their squared length is that of rounding in fp32


@dataclass(frozen=True)
class Novelty:
    """Adds `weight` times the elliptical bonus within each group that has a right completion.

    weight: β. reward: α, what the task's reward is multiplied with. ridge: λ, in squared units of the projected states.
    relative: λ is `ridge` times the mean squared length of the group's centred states. An absolute λ that is small
        beside them gives every distinct completion of a small group the same bonus, (n - 1)/n: watch the metric
        `novelty_spread`, the standard deviation within groups.
    dimensions: of the random projection, drawn anew each step; None, or at least the model's width: no projection.
    leave_one_out: the bonus against the others alone, b/(1 - b).
    correct: the reward from which on a completion is right. Where no member is, the whole group's bonus is 0.

    Leaves the fact `novelty` and the metrics `novelty` and `novelty_spread`.
    """

    weight: float = 0.01
    reward: float = 1.0
    ridge: float = 0.01
    relative: bool = False
    dimensions: int | None = 32
    leave_one_out: bool = False
    correct: float = 0.5
    reference: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.ridge <= 0 or (self.dimensions is not None and self.dimensions < 1):
            raise PosttrainError(
                f"novelty: ridge is {self.ridge}, dimensions {self.dimensions}; expected more than 0 and at least 1"
            )

    def __call__(self, groups: Sequence[Group], context: StepContext) -> None:
        if context.reference is None:
            raise RuntimeError("novelty needs the stage's reference policy; it runs inside the training loop")
        with context.reference() as frozen:
            states = mean_hidden(frozen, groups, context.token_budget)
        if self.dimensions is not None and self.dimensions < states.shape[1]:
            states = states @ sparse_projection(states.shape[1], self.dimensions, context.random("novelty")).T
        spreads = []
        for group, own in zip(groups, states.split([len(g) for g in groups]), strict=True):
            bonus = self.bonus(own)
            spreads.append(float(bonus.std(unbiased=False)))
            gate = float(any(t.reward >= self.correct - 1e-9 for t in group.trajectories))
            for trajectory, b in zip(group.trajectories, (gate * bonus).tolist(), strict=True):
                trajectory.facts["novelty"] = b
                trajectory.reward = self.reward * trajectory.reward + self.weight * b
        every = [t.facts["novelty"] for g in groups for t in g.trajectories]
        context.metrics["novelty"] = sum(every) / len(every)
        context.metrics["novelty_spread"] = sum(spreads) / len(spreads)

    def bonus(self, states: torch.Tensor) -> torch.Tensor:
        """`[n, d]` states of a group to `[n]` float64 bonuses."""
        ridge = self.ridge
        if self.relative:
            v = states.double()
            spread = float((v - v.mean(0)).square().sum(1).mean())
            if spread <= ROUNDING * float(v.square().sum(1).mean()):  # all say the same: none is novel
                return v.new_zeros(len(v))
            ridge *= spread
        bonus = elliptical_bonus(states, ridge)
        return bonus / (1 - bonus) if self.leave_one_out else bonus
