r"""A risk measure of bundled rewards in the place of their mean (RiskPO).

The groups of a step form *bundles*, so many consecutive ones at a time; the j-th completions of a bundle's prompts are
a *paper* with the score :math:`S` of their summed rewards. A paper's advantage is that of a risk measure of the scores'
distribution, and is handed back to its completions.
Reference: RiskPO, 2025, arXiv 2510.00911 (card 030).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from posttrain.objective.advantage import Credit, Fixed
from posttrain.objective.batch import Batch
from posttrain.trajectory import PosttrainError

LEVELS = tuple(round(0.05 * i, 2) for i in range(1, 20))  # of the tracked quantiles
FLAT = 1e-3  # a spread below which rewards count as equal
SHARE = 5.0  # largest share of a paper's advantage that a completion takes, either way

Mode = Literal["track", "batch", "mix"]
Sharing = Literal["uniform", "std", "sum-mean", "score"]
Tail = Literal["lower", "upper"]


@dataclass
class MixedValueAtRisk(Fixed):
    r"""Advantage of a mixed value-at-risk of papers' scores, with quantiles :math:`q_\alpha, q_\beta` of the scores:

    .. math::
        A = \frac{1}{w+1}\Big(-\frac{w\,(q_\alpha - S)^+}{\alpha}
            + \frac{(S - q_\alpha)^+ - (S - q_\beta)^+ + c}{\beta - \alpha}\Big)

    divided by the scores' standard deviation within the bundle (unbiased, plus 1e-6; 1 where scores are all equal, or
    there is one paper). Scores above :math:`q_\beta` all have the same advantage.

    Args:
        alpha, beta: the levels. weight: w. natural_baseline: c is :math:`q_\alpha - q_\beta`, else 0.
        bundle: prompts a bundle; those at a step's end may be fewer. Their scores are not comparable with the others':
            they are judged by their own papers' quantiles, and are not tracked.
        mode: the quantiles are `track` those followed over the steps, `batch` those of the bundle's own papers, `mix`
            the average of the two.
        rate: of the tracking, q_a += rate * (a - share of scores below q_a), after the step in which q_a was used. The
            first step uses, and starts from, the empirical quantiles of its own papers.
        sharing: what a completion of reward r gets of A: `uniform` A; `std` A over the standard deviation of its
            prompt's rewards; `sum-mean` A times its share of the paper's rewards over their prompts' means, at most 5
            either way (A over the bundle's size where the sum of those is about 0); `score` A times 0.5 if r > 0, else
            1.5.
        tail: `upper` is the risk-seeking contrast, with :math:`w\,(S - q_\beta)^+/(1-\beta)` in the first term's place.

    Papers are as many as the smallest group has completions; what is left over in others has advantage 0.
    """

    alpha: float = 0.2
    beta: float = 0.8
    weight: float = 1.5
    bundle: int = 5
    rate: float = 0.1
    mode: Mode = "track"
    sharing: Sharing = "sum-mean"
    natural_baseline: bool = False
    tail: Tail = "lower"
    tracked: list[float] = field(default_factory=list, init=False, repr=False, compare=False)
    _figures: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not 0 < self.alpha < self.beta < 1:
            raise PosttrainError(f"levels are alpha {self.alpha} and beta {self.beta}; expected 0 < alpha < beta < 1")
        if self.bundle < 1:
            raise PosttrainError(f"bundle is {self.bundle}; expected at least 1 prompt")
        for name, kinds in (("mode", Mode), ("sharing", Sharing), ("tail", Tail)):
            if getattr(self, name) not in get_args(kinds):
                raise PosttrainError(f"{name} is {getattr(self, name)!r}; expected one of {', '.join(get_args(kinds))}")

    def of(self, batch: Batch) -> Tensor:
        bundles = [_Bundle(batch.reward, members) for members in self._bundles(batch)]
        whole = [b for b in bundles if len(b.groups) == self.bundle]
        scores = torch.cat([b.score for b in whole]) if whole else torch.empty(0)
        scores = scores[scores.isfinite()]
        first = not self.tracked
        if first and len(scores):
            self.tracked = quantiles(scores, LEVELS).tolist()
        advantage = torch.zeros_like(batch.reward)
        for bundle in bundles:
            low, high = self._quantiles(bundle)
            bundle.share_out(advantage, bundle.scaled(self.paper(bundle.score, low, high)), self.sharing)
        self._figures = self._measure(scores)
        if not first and len(scores):
            self.follow(scores)
        return advantage

    def follow(self, scores: Tensor) -> None:
        """Move the tracked quantiles towards those of `[papers]` scores."""
        below = [float((scores < q).double().mean()) for q in self.tracked]
        self.tracked = [q + self.rate * (a - b) for q, a, b in zip(self.tracked, LEVELS, below, strict=True)]

    def credit(self, batch: Batch, logp: Tensor) -> Credit:
        credit = super().credit(batch, logp)
        credit.metrics = {name: logp.new_tensor([value]) for name, value in self._figures.items()}
        return credit

    def paper(self, score: Tensor, low: float, high: float) -> Tensor:
        """Advantages of papers before any scaling, from scores `[papers]` and the quantiles of levels α and β."""
        above, top = (score - low).clamp(min=0), (score - high).clamp(min=0)
        middle = (above - top + (low - high if self.natural_baseline else 0.0)) / (self.beta - self.alpha)
        end = top / (1 - self.beta) if self.tail == "upper" else -(low - score).clamp(min=0) / self.alpha
        return (self.weight * end + middle) / (self.weight + 1)

    def state_dict(self) -> dict[str, Any]:
        return {"tracked": self.tracked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tracked = [float(q) for q in state["tracked"]]

    def _bundles(self, batch: Batch) -> list[list[Tensor]]:
        """Sequence numbers of each group, bundle by bundle."""
        groups = [(batch.group == g).nonzero()[:, 0] for g in batch.group.unique()]
        return [groups[i : i + self.bundle] for i in range(0, len(groups), self.bundle)]

    def _quantiles(self, bundle: _Bundle) -> tuple[float, float]:
        own = quantiles(bundle.score, (self.alpha, self.beta)).tolist()
        if self.mode == "batch" or len(bundle.groups) < self.bundle or not self.tracked:
            return own[0], own[1]
        kept = [self.tracked[_nearest(level)] for level in (self.alpha, self.beta)]
        share = 1.0 if self.mode == "track" else 0.5
        low, high = (share * k + (1 - share) * o for k, o in zip(kept, own, strict=True))
        return low, high

    def _measure(self, score: Tensor) -> dict[str, float]:
        """The tracked quantiles, and the risk of the step's scores by their own ones."""
        if not len(score):
            return {}
        lower, upper = (level * tail_mean(score, level) for level in (self.alpha, self.beta))
        return {
            "quantile_low": self.tracked[_nearest(self.alpha)],
            "quantile_high": self.tracked[_nearest(self.beta)],
            "cvar": lower / self.alpha,
            "rvar": (upper - lower) / (self.beta - self.alpha),
        }


def quantiles(values: Tensor, levels: tuple[float, ...]) -> Tensor:
    """Empirical quantiles, interpolated: `[values]` to `[levels]`."""
    return values.quantile(torch.tensor(levels, dtype=values.dtype))


def tail_mean(values: Tensor, level: float) -> float:
    """Mean of the lowest share `level` of values `[values]` (CVaR): q - E[(q - S)^+] / level with their quantile q."""
    quantile = quantiles(values, (level,))
    return float(quantile - (quantile - values).clamp(min=0).mean() / level)


def _nearest(level: float) -> int:
    return min(range(len(LEVELS)), key=lambda i: abs(LEVELS[i] - level))


class _Bundle:
    """The completions of a bundle as a table. groups: sequence numbers of each prompt's completions."""

    def __init__(self, reward: Tensor, groups: list[Tensor]) -> None:
        self.groups = groups
        papers = min(len(g) for g in groups)
        self.members = torch.stack([g[:papers] for g in groups])  # [prompts, papers] sequence numbers
        self.reward = reward[self.members]
        self.score = self.reward.sum(0)
        self.mean = torch.stack([reward[g].mean() for g in groups])[:, None]
        self.spread = torch.stack([_spread(reward[g]) for g in groups])[:, None]

    def scaled(self, advantage: Tensor) -> Tensor:
        """`[papers]` advantages over the scores' spread."""
        return advantage / (_spread(self.score) + 1e-6)

    def share_out(self, into: Tensor, advantage: Tensor, sharing: Sharing) -> None:
        """Write each completion's part of its paper's advantage into `[S]`."""
        if sharing == "std":
            part = 1 / self.spread.expand_as(self.reward)
        elif sharing == "sum-mean":
            over = self.reward - self.mean
            total = over.sum(0)
            flat = total.abs() <= 1e-6
            part = torch.where(flat, 1 / len(over), over / total.masked_fill(flat, 1)).clamp(-SHARE, SHARE)
        elif sharing == "score":
            part = torch.where(self.reward > 0, 0.5, 1.5).to(advantage)
        else:
            part = torch.ones_like(self.reward)
        into[self.members] = part * advantage


def _spread(values: Tensor) -> Tensor:
    """Unbiased standard deviation, 1 where the values are about equal."""
    found = values.std() if len(values) > 1 else torch.zeros_like(values[0])
    return torch.where(found <= FLAT, torch.ones_like(found), found)
