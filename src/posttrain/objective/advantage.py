r"""Advantages: credit for each token. What distinguishes most methods stands here.

An advantage is either fixed before the update, from rewards (`prepare`, over the whole step), or follows from the
present log-probabilities (`credit`, as in preference losses: see pairs.py). Group statistics are always taken over a
group's own members, however many there are.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch
from torch import Tensor

from posttrain.objective.batch import Batch
from posttrain.objective.divergence import Need


@dataclass(slots=True)
class Credit:
    """advantage: `[M]` fp32, constant. value: the paper's own loss, each sequence's share `[S]`, where that is not
    -advantage * ratio (preference losses); it is weighted like a sequence's first token.
    """

    advantage: Tensor
    value: Tensor | None = None
    metrics: dict[str, Tensor] | None = None


class Advantage(Protocol):
    """needs: signals the loop must supply; keep_groups: whether micro-batches must hold whole groups."""

    @property
    def needs(self) -> frozenset[Need]: ...
    @property
    def keep_groups(self) -> bool: ...
    def prepare(self, batch: Batch) -> None:
        """Set what can be computed once, over the whole step (`batch.advantage`, `batch.returns`)."""
        ...

    def credit(self, batch: Batch, logp: Tensor) -> Credit:
        """Credit of each token in a micro-batch."""
        ...


class Fixed:
    """Base of advantages that rewards determine: subclasses say how in `of`, one value a sequence (or a token).

    minimum_group: completions a prompt below which every advantage would be 0.
    """

    needs: ClassVar[frozenset[Need]] = frozenset()
    keep_groups: ClassVar[bool] = False
    per_sequence: ClassVar[bool] = True
    minimum_group: ClassVar[int] = 1

    def of(self, batch: Batch) -> Tensor:
        """`[S]` fp32, or `[M]` where `per_sequence` is False."""
        raise NotImplementedError

    def prepare(self, batch: Batch) -> None:
        found = self.of(batch)
        batch.advantage = batch.spread(found) if self.per_sequence else found

    def credit(self, batch: Batch, logp: Tensor) -> Credit:
        if batch.advantage is None:
            raise RuntimeError("credit was asked for before prepare")
        return Credit(batch.advantage.to(logp.device))


@dataclass(frozen=True)
class Demonstration(Fixed):
    """Imitate every token alike, times the row's weight: advantage 1 (SFT)."""

    def of(self, batch: Batch) -> Tensor:
        return batch.weight


def group_mean(group: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over each sequence's group and the group's size, `[S]` each.

    Summed in float64, where the mean of equal fp32 values is that value exactly: a group without variance centres to 0.
    """
    _, index = group.unique(return_inverse=True)
    size = torch.bincount(index)
    total = torch.zeros(len(size), dtype=torch.float64).index_add(0, index, values.double())
    return (total / size)[index].to(values.dtype), size[index].to(values.dtype)


def group_std(group: Tensor, values: Tensor) -> Tensor:
    """Standard deviation within each sequence's group, unbiased (n - 1); 0 for a group of one. `[S]`."""
    mean, size = group_mean(group, values)
    squares, _ = group_mean(group, (values - mean) ** 2)
    return (squares * size / (size - 1).clamp(min=1)).sqrt()


@dataclass(frozen=True)
class Return(Fixed):
    """The outcome reward itself, minus a baseline: none, the step's mean, or the group's mean (REINFORCE)."""

    baseline: Literal["none", "batch", "group"] = "none"

    @property
    def minimum_group(self) -> int:  # type: ignore[override]
        return 2 if self.baseline == "group" else 1

    def of(self, batch: Batch) -> Tensor:
        if self.baseline == "batch":
            return batch.reward - batch.reward.mean()
        return batch.reward - group_mean(batch.group, batch.reward)[0] if self.baseline == "group" else batch.reward


@dataclass(frozen=True)
class GroupNormalised(Fixed):
    r"""Reward relative to its group: :math:`(R_i - \bar R)/(\sigma + \epsilon)` (GRPO), or without the division
    (Dr. GRPO). A group whose rewards are all equal has advantage 0, exactly.

    scale: `group` standard deviation (unbiased), `batch` standard deviation, or `none`.
    """

    scale: Literal["group", "batch", "none"] = "group"
    eps: float = 1e-4
    minimum_group: ClassVar[int] = 2

    def of(self, batch: Batch) -> Tensor:
        return self.normalise(batch.group, batch.reward)

    def normalise(self, group: Tensor, reward: Tensor) -> Tensor:
        """`[S]` group numbers and rewards to `[S]` advantages."""
        centred = reward - group_mean(group, reward)[0]
        spread = group_std(group, reward)
        # rewards that differ by rounding alone must not become a signal, amplified by the division
        centred = torch.where(spread <= 1e-6 * reward.abs().clamp(min=1), torch.zeros_like(centred), centred)
        if self.scale == "none" or len(reward) < 2:
            return centred
        return centred / ((spread if self.scale == "group" else reward.std()) + self.eps)


@dataclass(frozen=True)
class LeaveOneOut(Fixed):
    r"""Reward minus the mean of the others in its group (RLOO): :math:`R_i - \frac{1}{G-1}\sum_{j\ne i} R_j`.

    `kl` takes :math:`\beta\sum_t(\log\pi_{old}-\log\pi_{ref})_t` off every reward first. Alone in its group, a
    completion has no baseline: its advantage is its reward.
    """

    kl: float = 0.0

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset({"reference_logp", "old_logp"}) if self.kl else frozenset()

    def of(self, batch: Batch) -> Tensor:
        reward = batch.reward - self.kl * batch.sum(kl_penalty(batch)) if self.kl else batch.reward
        mean, size = group_mean(batch.group, reward)
        return torch.where(size > 1, (reward - mean) * size / (size - 1).clamp(min=1), reward)


@dataclass(frozen=True)
class DecoupledGroupNormalised(Fixed):
    """Every reward component normalised within its group by itself, then the weighted sum normalised over the step
    (GDPO): a component with a small spread keeps its say beside one with a large spread.

    weights: by component name; components not named weigh 1. A sequence that lacks a component (NaN) neither gains nor
    loses by it, and is no part of its group's mean.
    """

    weights: tuple[tuple[str, float], ...] = ()
    eps: float = 1e-4
    minimum_group: ClassVar[int] = 2

    def of(self, batch: Batch) -> Tensor:
        single = GroupNormalised("group", self.eps)
        weights = dict(self.weights)
        components = batch.rewards or {"reward": batch.reward}
        total = torch.zeros_like(batch.reward)
        for name, reward in components.items():
            has = ~reward.isnan()
            total[has] += weights.get(name, 1.0) * single.normalise(batch.group[has], reward[has])
        if len(total) < 2:
            return total - total
        return (total - total.mean()) / (total.std() + self.eps)


@dataclass(frozen=True)
class WhitenedReturn(Fixed):
    r"""Reward minus the KL to the reference still to come, whitened over all tokens of the step (REINFORCE++):

    .. math:: A_t = R - \beta \sum_{s \ge t} (\log\pi_{old} - \log\pi_{ref})_s

    baseline `group` subtracts the group's mean reward first (REINFORCE++-baseline). whiten False leaves A_t as it is.
    """

    kl: float = 0.01
    baseline: Literal["none", "group"] = "none"
    whiten: bool = True
    eps: float = 1e-8
    per_sequence: ClassVar[bool] = False

    @property
    def minimum_group(self) -> int:  # type: ignore[override]
        return 2 if self.baseline == "group" else 1

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset({"reference_logp", "old_logp"}) if self.kl else frozenset()

    def of(self, batch: Batch) -> Tensor:
        reward = batch.reward
        if self.baseline == "group":
            reward = reward - group_mean(batch.group, reward)[0]
        advantage = batch.spread(reward)
        if self.kl:
            advantage = advantage - self.kl * to_go(batch, kl_penalty(batch))
        return whitened(advantage, self.eps) if self.whiten else advantage


@dataclass(frozen=True)
class GAE(Fixed):
    r"""Generalised advantage estimation with a critic (PPO; 2015, arXiv 1506.02438):

    .. math:: \delta_t = r_t + \gamma V_{t+1} - V_t,\qquad A_t = \sum_l (\gamma\lambda)^l \delta_{t+l}

    :math:`r_t` is the token's own reward, minus `kl` times the k1 penalty, plus the outcome reward at the last token.
    Sets `batch.returns` = A + V before whitening, the critic's target.
    """

    gamma: float = 1.0
    lam: float = 0.95
    kl: float = 0.05
    whiten: bool = True
    per_sequence: ClassVar[bool] = False

    @property
    def needs(self) -> frozenset[Need]:  # type: ignore[override]
        return frozenset({"value", "old_logp", "reference_logp"} if self.kl else {"value", "old_logp"})

    def of(self, batch: Batch) -> Tensor:
        if batch.value is None:
            raise RuntimeError("GAE needs the critic's values")
        reward = batch.token_reward.clone()
        if self.kl:
            reward = reward - self.kl * kl_penalty(batch)
        ends = batch.lengths.cumsum(0) - 1
        reward[ends] += batch.reward
        advantage = torch.empty_like(reward)
        carried = following = 0.0
        values, rewards = batch.value.tolist(), reward.tolist()
        last = set(ends.tolist())
        for t in range(len(rewards) - 1, -1, -1):
            if t in last:
                carried = following = 0.0
            carried = rewards[t] + self.gamma * following - values[t] + self.gamma * self.lam * carried
            following = values[t]
            advantage[t] = carried
        batch.returns = advantage + batch.value
        return whitened(advantage) if self.whiten else advantage


def kl_penalty(batch: Batch) -> Tensor:
    """k1 penalty of each token, log pi_old - log pi_ref, `[M]`."""
    if batch.old_logp is None or batch.reference_logp is None:
        raise RuntimeError("a KL penalty in the reward needs old and reference log-probabilities")
    return batch.old_logp - batch.reference_logp


def to_go(batch: Batch, values: Tensor) -> Tensor:
    """Sum of a per-token array from each token to the end of its sequence, `[M]`."""
    total = values.to(torch.float64).cumsum(0)
    ends = total[batch.lengths.cumsum(0) - 1]
    return (batch.spread(ends) - total + values).to(values.dtype)


def whitened(values: Tensor, eps: float = 1e-8) -> Tensor:
    """Mean 0 and variance 1 over all tokens of the step; exactly 0 where all are equal."""
    if len(values) < 2:
        return values - values.mean()
    wide = values.double()
    return ((wide - wide.mean()) / (wide.var() + eps).sqrt()).to(values.dtype)
