r"""Distributions as the arms of a bandit: rows come from where the advantages are still large.

The mean absolute advantage of a distribution is near 0 where everything is solved and where nothing is, so it says how
much there is to learn. Reference: DUMP, 2025, arXiv 2504.09710 (card 087).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from posttrain.data.domains import ByDomain, label_of
from posttrain.objective.advantage import GroupNormalised
from posttrain.trajectory import Group, PosttrainError, Prompt


def upper_confidence(means: ArrayLike, counts: ArrayLike) -> NDArray[np.float64]:
    r"""`[arms]` :math:`\mu_d + \sqrt{2\ln(N+1)/(n_d+1)}` with N the sum of the counts."""
    n = np.asarray(counts, dtype=np.float64)
    return np.asarray(means, dtype=np.float64) + np.sqrt(2 * np.log(n.sum() + 1) / (n + 1))


def softmax(values: ArrayLike, temperature: float = 1.0) -> NDArray[np.float64]:
    """Shares in proportion to exp(value / temperature)."""
    scaled = np.asarray(values, dtype=np.float64) / temperature
    powers = np.exp(scaled - scaled.max())
    return powers / powers.sum()


class UpperConfidence(ByDomain):
    r"""Domains drawn in proportion to :math:`\exp(\mathrm{UCB}_d/\tau)`, the domain's recent mean :math:`|A|` plus a
    bonus for what was seen little.

    .. math:: \mathrm{UCB}_d = \frac{1}{|W_d|}\sum_{a \in W_d} a + \sqrt{\frac{2\ln(N+1)}{n_d+1}}

    Args:
        temperature: τ. window: how many of a domain's last :math:`|A|` are remembered, one a completion.
        advantage: what is done to a group's rewards to make its advantages, as in the method's objective; taken from
            the rewards as they are admitted, before any clipping or masking.
        by: the label in a prompt's `meta` that tells domains apart.
    """

    def __init__(
        self,
        rows: Sequence[Prompt | Group],
        seed: int = 0,
        temperature: float = 0.1,
        window: int = 300,
        advantage: GroupNormalised | None = None,
        by: str = "domain",
    ) -> None:
        super().__init__(rows, seed, by=by)
        if not temperature > 0 or window < 1:
            raise PosttrainError(
                f"bandit: got temperature={temperature}, window={window}; expected numbers above 0 (window: whole)"
            )
        self.temperature = temperature
        self.advantage = advantage or GroupNormalised()
        self.recent = {name: deque[float](maxlen=window) for name in self.rows}
        self.counts = dict.fromkeys(self.rows, 0)

    def probabilities(self) -> NDArray[np.float64]:
        means = [sum(seen) / len(seen) if seen else 0.0 for seen in self.recent.values()]
        return softmax(upper_confidence(means, list(self.counts.values())), self.temperature)

    def admit(self, groups: Sequence[Group]) -> list[Group]:
        """All of them; their advantages are remembered."""
        if not groups:
            return []
        # rollouts alone: a demonstration beside them says nothing about what the policy has left to learn
        sampled = [[t.reward for t in g.trajectories if t.source == "policy"] for g in groups]
        rewards = torch.tensor([r for own in sampled for r in own], dtype=torch.float32)
        sizes = torch.tensor([len(own) for own in sampled])
        size = self.advantage.normalise(torch.repeat_interleave(torch.arange(len(groups)), sizes), rewards).abs()
        for group, own in zip(groups, size.split(sizes.tolist()), strict=True):
            name = label_of(group, self.by)
            self.recent[name].extend(own.tolist())
            self.counts[name] += len(own)
        return list(groups)

    def metrics(self) -> dict[str, float]:
        learning = {f"advantage/{n}": sum(seen) / len(seen) for n, seen in self.recent.items() if seen}
        return super().metrics() | learning

    def state_dict(self) -> dict[str, Any]:
        recent = {name: list(seen) for name, seen in self.recent.items()}
        return super().state_dict() | {"recent": recent, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        for name, seen in self.recent.items():
            seen.clear()
            seen.extend(state["recent"][name])
        self.counts = {name: int(state["counts"][name]) for name in self.rows}
