"""ABQ-LLM: learned clipping held to the direction of a block's outputs and to its attention, with balanced levels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.solvers.equivalent import WithScales
from posttrain.compress.solvers.learned import SoftWeight, grouped_range
from posttrain.compress.solvers.omniquant import START, ClippedRange
from posttrain.compress.solvers.reconstruct import Known, Seen, Target
from posttrain.compress.walk import Block
from posttrain.trajectory import PosttrainError

SMALLEST = 1e-6  # of a cosine's size and of a probability, before their logarithm
FIRST, LAST = 3, 4  # blocks at either end whose last layer gets a rank-one correction


class CorrectedRange(ClippedRange):
    """Learned clipping of W + a bᵀ, with a learned from 0 and b from 1: rounded with the weight, and so free."""

    def __init__(self, *args: object, correction_rate: float, **options: object) -> None:
        super().__init__(*args, **options)  # type: ignore[arg-type]
        self.correction_rate = correction_rate
        self.column = nn.Parameter(torch.zeros(self.weight.shape[0], 1))
        self.row = nn.Parameter(torch.ones(1, self.weight.shape[1]))

    def ends(self) -> tuple[Tensor, Tensor]:
        return grouped_range(self.meant(), self.low.shape[1])

    def meant(self) -> Tensor:
        return super().meant() + self.column * self.row

    def groups(self) -> list[dict[str, object]]:
        return [*super().groups(), {"params": [self.column, self.row], "lr": self.correction_rate}]


@dataclass(frozen=True)
class ArbitraryBit(WithScales):
    r"""OmniQuant's learned clipping with ABQ-LLM's losses.

        L = Σ_d (- log|cos(h', d)| + mse · ||h' - d||²/n) + attention (KL(A'||A) + KL(A||A'))

    summed over the outputs d of the float block on the float model's inputs and on the compressed prefix's; A are the
    attention maps, averaged over heads, of the float block in the float model.

    rate: of the clipping. start: of it. balance: at one and two bits, 2^b + 1 levels in the place of 2^b. correction:
    rate of the rank-one correction of the last layer in the first three and last four blocks; 0 for none. mse,
    attention: weights of those terms. literal: the attention term as in the authors' code, which takes a softmax of the
    maps and averages over their elements. Learned scales of channels: see `WithScales`.

    Reference: ABQ-LLM, 2024, arXiv 2408.08554 (card 151).
    """

    targets: tuple[Target, ...] = ("float", "prefix")
    rate: float = 0.01
    start: float = START
    balance: bool = True
    correction: float = 0.01
    mse: float = 1.0
    attention: float = 1.0
    literal: bool = False

    def soft(self, weight: Tensor, grid: Uniform, block: Block, name: str, known: Known) -> SoftWeight:
        bits, groups = int(grid.bits), weight.shape[1] // grid.width(weight.shape[1], f"{block.name}.{name}")
        levels = 2**bits + 1 if self.balance and bits <= 2 else 2**bits
        if self.correction > 0 and self._corrects(block, name, known):
            return CorrectedRange(
                weight, bits, groups, levels=levels, rate=self.rate, start=self.start, correction_rate=self.correction
            )
        return ClippedRange(weight, bits, groups, levels=levels, rate=self.rate, start=self.start)

    @staticmethod
    def _corrects(block: Block, name: str, known: Known) -> bool:
        """Whether a layer is one of those that end a block near either end of the model (of a mixture: all experts)."""
        reached = [phase for phase in block.phases if phase]
        outer = block.index < FIRST or block.index >= known.blocks - LAST
        return outer and name in reached[-1]

    @property
    def watches_attention(self) -> bool:
        return self.attention > 0

    def loss(self, seen: Seen, wanted: dict[Target, Seen]) -> Tensor:
        found = torch.zeros(())
        for each in wanted.values():
            found = found + direction_loss(seen.hidden, each.hidden)
            found = found + self.mse * F.mse_loss(seen.hidden.float(), each.hidden.float())
        if self.watches_attention:
            if not seen.maps:
                raise PosttrainError(
                    "abq-llm: a block computes no attention through the attention interface of transformers, so there "
                    "is no map to compare; give attention=0"
                )
            truth = wanted["float"].maps
            pairs = zip(seen.maps, truth, strict=True)
            found = found + self.attention * torch.stack([attention_loss(m, t, self.literal) for m, t in pairs]).sum()
        return found


def direction_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """- log |mean over tokens of the cosine over features|, of `[..., width]`."""
    cosine = F.cosine_similarity(found.float(), wanted.float(), dim=-1).mean()
    return -cosine.abs().clamp(min=SMALLEST).log()


def attention_loss(found: Tensor, wanted: Tensor, literal: bool = False) -> Tensor:
    """KL in both directions between `[rows, queries, keys]` maps, the mean over queries.

    literal: of the softmax of the maps, the mean over all elements: the form of the authors' code, whose gradient is
    tiny.
    """
    p, q = found.float(), wanted.float()
    if literal:
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).mean()
    log_p, log_q = p.clamp(min=SMALLEST).log(), q.clamp(min=SMALLEST).log()
    return ((p - q) * (log_p - log_q)).sum(-1).mean()
