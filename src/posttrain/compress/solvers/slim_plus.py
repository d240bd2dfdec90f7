"""SliM-LLM+: the bits of SliM-LLM's groups, with learned clipping in the place of GPTQ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.packed.mixed import MixedColumns
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.packed.weight import PackedWeight
from posttrain.compress.solvers.learned import SoftWeight, held, held_scale, nearest
from posttrain.compress.solvers.omniquant import START, ClippedRange
from posttrain.compress.solvers.reconstruct import Known, Reconstruction
from posttrain.compress.solvers.slim import SliM, sign_levels
from posttrain.compress.walk import Block


@dataclass(frozen=True)
class MixedClipping(Reconstruction):
    """Learned clipping, block after block, of groups with bits of their own.

    plan: says which group has how many bits, from the statistics of the block's inputs. rate: of the clipping.

    Reference: SliM-LLM, 2024, arXiv 2405.14917 (card 148).
    """

    plan: SliM = field(default_factory=SliM)
    rate: float = 0.01

    def soft(self, weight: Tensor, grid: Uniform, block: Block, name: str, known: Known) -> SoftWeight:
        moments = block.moments([name], keep=self.plan.keep)[name]
        bias = block.linears[name].bias
        bits = self.plan.planned(
            weight, None if bias is None else bias.detach().float(), moments, grid.bits, f"{block.name}.{name}"
        )
        return MixedRanges(weight, bits, self.rate)


class MixedRanges(SoftWeight):
    """A `ClippedRange` for the columns of each number of bits, a `SignRange` for those of one. plan: of each group."""

    def __init__(self, weight: Tensor, plan: Sequence[int], rate: float) -> None:
        super().__init__()
        bits, width = torch.tensor(list(plan)), weight.shape[1] // len(plan)
        self.part_of = torch.zeros(weight.shape[1], dtype=torch.int64)
        parts = []
        for number, each in enumerate(sorted(set(plan))):
            columns = (bits == each).repeat_interleave(width)
            self.part_of[columns] = number
            mine, groups = weight[:, columns], int((bits == each).sum())
            parts.append(SignRange(mine, groups, rate) if each == 1 else ClippedRange(mine, each, groups, rate=rate))
        self.parts = nn.ModuleList(parts)
        self.back = torch.argsort(torch.argsort(self.part_of, stable=True))

    def forward(self) -> Tensor:
        return torch.cat([part() for part in self.parts], 1)[:, self.back]

    def pack(self) -> PackedWeight:
        return MixedColumns.of([part.pack() for part in self._ranges()], self.part_of)

    def groups(self) -> list[dict[str, Any]]:
        return [group for part in self._ranges() for group in part.groups()]

    def _ranges(self) -> list[ClippedRange]:
        return [part for part in self.parts if isinstance(part, ClippedRange)]


class SignRange(ClippedRange):
    """One bit: the ends of the learned range themselves, beginning at the two values of `sign_levels`.

    An integer zero point would leave 0 as one of two values, so the lower end is stored. Which of the two a weight
    takes is a constant for the gradient: the straight-through term, small where levels are close, would be most of it.
    """

    def __init__(self, weight: Tensor, groups: int, rate: float) -> None:
        super().__init__(weight, 1, groups, rate=rate)
        levels = [sign_levels(group) for group in weight.split(weight.shape[1] // groups, 1)]
        low = torch.cat([each.zero for each in levels], 1)
        high = low + torch.cat([each.scale for each in levels], 1)
        with torch.no_grad():
            self.lower.copy_(_logit(low, self.low))
            self.upper.copy_(_logit(high, self.high))

    def levels(self) -> tuple[Tensor, Tensor]:
        low = held(torch.sigmoid(self.lower) * self.low)
        return held_scale(torch.sigmoid(self.upper) * self.high - low), low

    def forward(self) -> Tensor:
        scale, zero = self.levels()
        codes = nearest(self.weight, scale.detach(), zero.detach(), 1, float_zero=True)
        by_group = codes.view(*scale.shape, -1)
        return torch.addcmul(zero[..., None], by_group, scale[..., None]).view(self.weight.shape)

    def pack(self) -> PackedWeight:
        scale, zero = self.levels()
        return UniformWeight.of(nearest(self.weight, scale, zero, 1, float_zero=True), scale, zero, 1, "float")


def _logit(wanted: Tensor, end: Tensor) -> Tensor:
    """What the sigmoid makes the share of `end` that `wanted` is; near the whole of it where it is no share."""
    share = wanted / torch.where(end == 0, 1.0, end)
    return torch.where((share > 0) & (share < 1), torch.logit(share.clamp(0.01, 0.99)), START)
