r"""Baselines that peers have beside the group's mean: what a reward is compared with.

A baseline that does not depend on the sampled token leaves the gradient's expectation alone and changes its variance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from posttrain.objective.advantage import Fixed, group_mean, group_std, to_go
from posttrain.objective.batch import Batch
from posttrain.objective.divergence import Need


@dataclass(frozen=True)
class BestOverSecond(Fixed):
    r"""Only the best completion of a group earns credit: :math:`R_{max} - R_{second}` (of two equally good ones none).

    The gradient of the expected best of the group, up to the spread: `scale` divides by the group's unbiased standard
    deviation plus `eps`.
    """

    scale: bool = True
    eps: float = 1e-6
    minimum_group: ClassVar[int] = 2

    def of(self, batch: Batch) -> Tensor:
        advantage = torch.zeros_like(batch.reward)
        for g in batch.group.unique():
            members = (batch.group == g).nonzero()[:, 0]
            if len(members) > 1:
                best, second = batch.reward[members].topk(2).values
                advantage[members[batch.reward[members].argmax()]] = best - second
        return advantage / (group_std(batch.group, batch.reward) + self.eps) if self.scale else advantage


@dataclass(frozen=True)
class LengthWeighted(Fixed):
    r"""Reward minus the group's mean reward weighted with length: :math:`b = \sum_j T_j R_j / \sum_j T_j`.

    The baseline of least variance where gradients of different tokens are orthogonal and equally large.
    """

    minimum_group: ClassVar[int] = 2

    def of(self, batch: Batch) -> Tensor:
        length = batch.lengths.to(batch.reward)
        top, _ = group_mean(batch.group, batch.reward * length)
        bottom, _ = group_mean(batch.group, length)
        return batch.reward - top / bottom


@dataclass(frozen=True)
class AgainstFact(Fixed):
    """Reward minus a number that the rollout strategy left on the trajectory, such as the greedy answer's reward."""

    fact: str

    def of(self, batch: Batch) -> Tensor:
        found = batch.facts.get(self.fact)
        if found is None or bool(found.isnan().any()):
            raise ValueError(f"the advantage compares with the fact {self.fact!r}; the rollout strategy left none")
        return batch.reward - found.to(batch.reward.dtype)


@dataclass(frozen=True)
class UndecidedRescaled(Fixed):
    r""":math:`\alpha (R_i - \bar R)`, with :math:`\alpha` the step's completions over those in groups whose rewards
    differ: a step in which few groups say anything is as large as one in which all do (GPG).
    """

    minimum_group: ClassVar[int] = 2

    def of(self, batch: Batch) -> Tensor:
        centred = batch.reward - group_mean(batch.group, batch.reward)[0]
        undecided = group_std(batch.group, batch.reward) > 1e-6 * batch.reward.abs().clamp(min=1)
        alpha = len(undecided) / max(1, int(undecided.sum()))
        return torch.where(undecided, alpha * centred, torch.zeros_like(centred))


@dataclass(frozen=True)
class OptimalTokenBaseline(Fixed):
    r"""A baseline of its own for every token, which weighs the group's members by how much gradient they have
    accumulated so far:

    .. math:: B_t = \frac{\sum_i G_{it} W_{it}}{\sum_i W_{it}},\qquad
              W_{it} = \sum_{s \le t} (1 - 2\pi(y_{is}) + \textstyle\sum_v \pi(v)^2)

    over the members that are at least t tokens long; :math:`G_{it}` is the reward still to come. The bracket is the
    squared norm of the gradient of :math:`\log\pi(y_{is})` with respect to the logits.
    """

    eps: float = 1e-8
    per_sequence: ClassVar[bool] = False
    minimum_group: ClassVar[int] = 2
    needs: ClassVar[frozenset[Need]] = frozenset({"old_logp", "collision"})

    def of(self, batch: Batch) -> Tensor:
        assert batch.old_logp is not None
        ends = batch.lengths.cumsum(0)
        reward = batch.token_reward.clone()
        reward[ends - 1] += batch.reward
        returns = to_go(batch, reward)
        energy = 1 - 2 * batch.old_logp.exp() + batch.extras["collision"]
        total = energy.double().cumsum(0)
        start = ends - batch.lengths
        before = torch.where(start > 0, total[start - 1], 0)
        weight = (total - batch.spread(before)).to(energy.dtype)
        place = torch.arange(len(reward)) - batch.spread(start)  # which action of its sequence each token is
        cell = batch.spread(batch.group) * (int(batch.lengths.max()) + 1) + place
        _, index = cell.unique(return_inverse=True)
        top = returns.new_zeros(int(index.max()) + 1).index_add(0, index, returns * weight)
        bottom = returns.new_zeros(len(top)).index_add(0, index, weight)
        baseline = (top / (bottom + self.eps))[index]
        alone = torch.bincount(index)[index] == 1  # no other member is long enough to compare with
        baseline[alone] = batch.spread(group_mean(batch.group, batch.reward)[0])[alone]
        return returns - baseline
