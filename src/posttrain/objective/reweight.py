r"""Several objectives in one step, weighted anew from how each has been doing: those that stopped improving, or that
fluctuate, get more weight.

.. math:: L = \frac1K \sum_k \lambda_k L_k,\qquad \lambda_k = K\,\mathrm{softmax}_k(s / T),\qquad s_k = c_k + i_k

A *channel* is an objective with a history: the rollouts of a domain (its value is 1 - mean reward), a domain that is
imitated (mean negative log-likelihood a token), or a component of the reward. A rollout strategy says which domain a
sequence is of by the fact `channel/<domain>`.
Reference: RECAP, 2025, arXiv 2510.21978 (card 012); the ratio of windows is that of dynamic weight averaging.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, pstdev
from typing import Any, ClassVar

import torch
from torch import Tensor

from posttrain.objective.advantage import Fixed, GroupNormalised
from posttrain.objective.batch import Batch, Totals
from posttrain.objective.divergence import Need
from posttrain.objective.estimator import Loss
from posttrain.objective.likelihood import Likelihood
from posttrain.objective.mixture import Mixture
from posttrain.trajectory import PosttrainError

CHANNEL, WEIGHT = "channel/", "weight/"
IMITATION = "imitation"  # the channel of all that is imitated, where the others are components of the reward
SOLVED = 1e-3  # means below it count as nothing left to improve
FLOOR = 1e-6


def convergence(history: Sequence[float]) -> tuple[float, float]:
    r"""Convergence c and instability i of a history of 2W values, where lower values are better.

    .. math:: c = \mu/\tilde\mu \in [0, 2],\qquad i = \sigma/(\mu + \tilde\mu)

    μ and σ are mean and (population) standard deviation of the newer half, :math:`\tilde\mu` the mean of the older one.
    c is below 1 for values that fall, and both are 0 where the values are all but 0: there is nothing left to improve.
    """
    half = len(history) // 2
    older, newer = history[:half], history[half:]
    before, now = fmean(older), fmean(newer)
    if max(abs(before), abs(now)) < SOLVED:
        return 0.0, 0.0
    # of equal values the deviation is 0, exactly
    return min(2.0, max(0.0, now / max(before, FLOOR))), pstdev(newer) / max(now + before, FLOOR)


def shares(priorities: Mapping[str, float], temperature: float) -> dict[str, float]:
    """λ of each channel: K times the softmax of the priorities; they sum to K."""
    top = max(priorities.values())
    powers = {name: math.exp((s - top) / temperature) for name, s in priorities.items()}
    total = sum(powers.values())
    return {name: len(powers) * power / total for name, power in powers.items()}


@dataclass
class ConvergenceWeights:
    """Weights of the channels from their last 2 x `window` values each; all 1 until every channel has so many.

    temperature: T; the larger, the more alike the weights (inf: all 1).
    """

    window: int = 10
    temperature: float = 5.0
    history: dict[str, list[float]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.window < 1 or not self.temperature > 0:
            raise PosttrainError(
                f"reweighting: window={self.window}, temperature={self.temperature}; expected a whole number from 1, "
                f"and a number above 0"
            )

    def observe(self, values: Mapping[str, float]) -> None:
        """Append a step's values; a channel that the step has not keeps its history as it is."""
        for name, value in values.items():
            own = self.history.setdefault(name, [])
            own.append(float(value))
            del own[: -2 * self.window]

    def now(self) -> dict[str, float]:
        """λ by channel."""
        if any(len(own) < 2 * self.window for own in self.history.values()):
            return dict.fromkeys(self.history, 1.0)
        return shares({name: sum(convergence(own)) for name, own in self.history.items()}, self.temperature)

    def state_dict(self) -> dict[str, Any]:
        return {"history": {name: list(own) for name, own in self.history.items()}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = {name: list(own) for name, own in state["history"].items()}


def channels_of(batch: Batch, components: Sequence[str] = ()) -> dict[str, Tensor]:
    """The reward of each sequence in each channel, `[S]`, NaN where the sequence is not of that channel.

    components: of the reward, as channels of the sequences that have them; none: domains are the channels.
    """
    if components:
        missing = [name for name in components if name not in batch.rewards]
        if missing:
            raise PosttrainError(f"no completion has the reward component {missing[0]!r}, which is to be a channel")
        return {name: batch.rewards[name] for name in components}
    found = {}
    for name, member in batch.facts.items():
        if name.startswith(CHANNEL):
            found[name.removeprefix(CHANNEL)] = torch.where(member == 1, batch.reward, float("nan"))
    return found


def _weight(batch: Batch, channel: str, members: Tensor) -> Tensor:
    """λ/K of a channel for the sequences that are in it, as `Reweighted` left it in the batch."""
    if WEIGHT + channel not in batch.facts:
        raise RuntimeError(f"channel {channel} has no weight; its term belongs in a Reweighted mixture")
    return batch.facts[WEIGHT + channel][members].to(batch.reward.dtype)


@dataclass(frozen=True)
class ChannelNormalised(Fixed):
    r"""GRPO's advantage in every channel by itself, in the proportion that makes a mean over all sequences
    (`SequenceMean`) the weighted sum of the channels' own means: :math:`\sum_k \frac{\lambda_k}{K}\frac{N}{N_k} A^k_i`.
    """

    components: tuple[str, ...] = ()
    eps: float = 1e-4
    minimum_group: ClassVar[int] = 2

    def of(self, batch: Batch) -> Tensor:
        single = GroupNormalised("group", self.eps)
        total = torch.zeros_like(batch.reward)
        for name, reward in channels_of(batch, self.components).items():
            has = ~reward.isnan()
            if bool(has.any()):
                own = single.normalise(batch.group[has], reward[has])
                total[has] += _weight(batch, name, has) * len(total) / int(has.sum()) * own
        return total


@dataclass(frozen=True)
class ChannelImitated(Fixed):
    r"""Imitation in every channel by itself, in the proportion that makes a mean over all tokens (`TokenMean`) the
    weighted sum of the channels' own means: :math:`\frac{\lambda_k}{K}\frac{M}{M_k}`.
    """

    together: bool = False

    def of(self, batch: Batch) -> Tensor:
        advantage = batch.weight.clone()
        for name, members in imitated(batch, self.together).items():
            share = batch.lengths.sum() / batch.lengths[members].sum()
            advantage[members] *= _weight(batch, name, members) * share
        return advantage


def imitated(batch: Batch, together: bool) -> dict[str, Tensor]:
    """Which sequences each channel of imitation has, `[S]` bool. together: one channel for all of them."""
    if together:
        return {IMITATION: torch.ones(len(batch), dtype=torch.bool)}
    found = {name.removeprefix(CHANNEL): m == 1 for name, m in batch.facts.items() if name.startswith(CHANNEL)}
    return {name: members for name, members in found.items() if bool(members.any())}


@dataclass(frozen=True)
class Reweighted(Mixture):
    """A mixture whose channels are weighted by their histories: rollouts ("policy") with `ChannelNormalised`, replayed
    demonstrations ("replay") with `ChannelImitated`.

    components: of the reward, as the channels of the rollouts; none: domains.
    """

    weights: ConvergenceWeights = field(default_factory=ConvergenceWeights)
    components: tuple[str, ...] = ()

    @property
    def needs(self) -> frozenset[Need]:
        return super().needs | {"old_logp"}  # what is imitated is judged by the likelihood that it has now

    @property
    def parts(self) -> tuple[object, ...]:
        return (*super().parts, self.weights)

    def prepare(self, batch: Batch) -> None:
        self.weights.observe(self.values(batch))
        for name, weight in self.weights.now().items():
            batch.facts[WEIGHT + name] = torch.full((len(batch),), weight / len(self.weights.history))
        super().prepare(batch)

    def values(self, batch: Batch) -> dict[str, float]:
        """What each channel of the batch is worth now, lower is better."""
        found: dict[str, float] = {}
        for term in self.terms:
            members = term.members(batch)
            if not len(members):
                continue
            own = batch.select(members)
            if "policy" in term.sources:
                for name, reward in channels_of(own, self.components).items():
                    if bool((~reward.isnan()).any()):
                        found[name] = 1 - float(reward.nanmean())
            else:
                assert own.old_logp is not None
                for name, which in imitated(own, bool(self.components)).items():
                    found[name] = -float(own.sum(own.old_logp)[which].sum() / own.lengths[which].sum())
        return found

    def __call__(self, batch: Batch, likelihood: Likelihood, totals: Totals) -> Loss:
        loss = super().__call__(batch, likelihood, totals)
        for name, weight in self.weights.now().items():
            loss.metrics[f"weight/{name}"] = (weight, 1)
        return loss
