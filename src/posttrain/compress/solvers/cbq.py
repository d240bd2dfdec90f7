"""CBQ: windows of several blocks that overlap, low-rank learned rounding, and outliers that are cut off before."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.solvers.adaround import Commitment, LearnedRounding, weights_in
from posttrain.compress.solvers.learned import SoftWeight, fitted
from posttrain.compress.solvers.reconstruct import Known, Reconstruction, Seen, Target
from posttrain.compress.walk import Block

COARSE, FINE = 1.5, 1.0  # λ1 and λ2 of the split


@dataclass(frozen=True)
class CrossBlock(Reconstruction):
    r"""Step sizes and rounding of several blocks trained together, on ||h - h'||² + KL(softmax h || softmax h').

    h, of the float blocks, and h', of the quantized ones, come from the same inputs, those that the compressed blocks
    before the window give (target `prefix`); the target `float` adds the float model's own stream.

    rank: of what is added to the rounding's logits; 0 learns each logit. rate: of the rounding. step_rate: of the
    steps, as shares of their first values. commitment: see there. hard: train what is stored (see `LearnedRounding`).
    divergence: weight of the KL term. truncate: cut outlying weights off (the float blocks keep theirs).

    Reference: CBQ, 2023, arXiv 2312.07950 (card 147).
    """

    targets: tuple[Target, ...] = ("prefix",)
    rank: int = 5
    rate: float = 0.05
    step_rate: float = 0.005
    commitment: Commitment = field(default_factory=lambda: Commitment(0.0))
    hard: bool = True
    divergence: float = 1.0
    truncate: bool = True

    def soft(self, weight: Tensor, grid: Uniform, block: Block, name: str, known: Known) -> SoftWeight:
        if self.truncate:
            weight = truncated(weight)
        scale, zero = fitted(weight, grid, f"{block.name}.{name}")
        draw = torch.Generator().manual_seed(block.seed * 1009 + block.index * 31 + list(block.linears).index(name))
        return LearnedRounding(
            weight, scale, zero, int(grid.bits), grid.zero, rate=self.rate, step_rate=self.step_rate, rank=self.rank,
            commitment=self.commitment, share=weight.numel() / weights_in(block), hard=self.hard, draw=draw,
        )  # fmt: skip

    def loss(self, seen: Seen, wanted: dict[Target, Seen]) -> Tensor:
        losses = [hidden_distance(seen.hidden, w.hidden, self.divergence) for w in wanted.values()]
        return torch.stack(losses).sum()


def hidden_distance(found: Tensor, wanted: Tensor, divergence: float = 1.0) -> Tensor:
    """Squared distance plus KL(softmax(wanted) || softmax(found)) over the features, the mean over tokens."""
    found, wanted = found.float(), wanted.float()
    squared = ((found - wanted) ** 2).sum(-1).mean()
    if not divergence:
        return squared
    target = F.log_softmax(wanted, -1)
    kl = (target.exp() * (target - F.log_softmax(found, -1))).sum(-1).mean()
    return squared + divergence * kl


def reserved_limit(values: Tensor, coarse: float = COARSE, fine: float = FINE) -> float:
    r"""The largest size that is no outlier, of `[n]` sizes.

    Coarse: candidates lie above T = Q3 + λ1 (Q3 - Q1). Fine: the sorted candidates are split where the squared gap
    between the reserved and the outlying minus λ2 times the variance of the reserved is largest. With nothing reserved
    the limit is T; with no outlier (a gap of 0) all are reserved.

    coarse, fine: λ1 and λ2.
    """
    values = values.double().flatten().sort().values
    first, third = _quantile(values, 0.25), _quantile(values, 0.75)
    limit = third + coarse * (third - first)
    candidates = values[values > limit]
    count = len(candidates)
    if not count:
        return float(values[-1])
    edges = torch.cat([torch.tensor([limit], dtype=torch.float64), candidates])
    gaps = torch.cat([(candidates - edges[:-1]) ** 2, torch.zeros(1, dtype=torch.float64)])
    size = torch.arange(count + 1, dtype=torch.float64).clamp(min=1)
    zero = torch.zeros(1, dtype=torch.float64)
    away = candidates - candidates[0]  # so that the difference of squares does not cancel
    mean = torch.cat([zero, away.cumsum(0)]) / size
    variance = torch.cat([zero, (away**2).cumsum(0)]) / size - mean**2
    split = int((gaps - fine * variance).argmax())
    return float(edges[split])


def _quantile(ascending: Tensor, share: float) -> float:
    """Of sorted values, between the two nearest (`torch.quantile` takes no large tensors)."""
    place = share * (len(ascending) - 1)
    low = int(place)
    high = min(low + 1, len(ascending) - 1)
    return float(ascending[low] + (place - low) * (ascending[high] - ascending[low]))


def truncated(weight: Tensor) -> Tensor:
    """The weight with outlying sizes cut to the largest that is none.

    Settled here: nothing is cut where the gap before the outlying is no wider than the standard deviation of the sizes
    that stay. Some split of the candidates always wins, of a normal distribution one a hair above T, at 2.4 standard
    deviations; rounding could not bring back what is cut off there.
    """
    sizes = weight.abs()
    limit = reserved_limit(sizes)
    stay = sizes <= limit
    if stay.all() or float(sizes[~stay].min()) - limit <= float(sizes[stay].std()):
        return weight
    return weight.clamp(-limit, limit)
