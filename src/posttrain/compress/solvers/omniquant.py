"""Learned clipping: the ends of each group's range move inwards as far as the block's outputs ask for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.packed.levels import LevelsWeight
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.packed.weight import PackedWeight
from posttrain.compress.solvers.equivalent import WithScales
from posttrain.compress.solvers.learned import ChannelScale, SoftWeight, fake_quantized, grouped_range, held, nearest
from posttrain.compress.solvers.reconstruct import Known
from posttrain.compress.walk import Block
from posttrain.trajectory import PosttrainError

START = 4.0  # sigmoid(4) = 0.982 of the range
NARROWEST, WIDEST = 1e-5, 1e4  # of a scale


class ClippedRange(SoftWeight):
    r"""Levels between learned shares of each group's smallest and largest weight.

        w_max' = σ(γ) w_max,  w_min' = σ(β) w_min,  s = (w_max' - w_min')/top,  z = round(-w_min'/s)

    The range is not extended to hold 0 and z is not clipped to the codes; it gets no gradient of its own. It is stored
    as a code where every zero of the matrix is one (where no group has weights of one sign alone), else as a float.

    levels: how many, 2^b by default. symmetric: s = max(|w_max'|, |w_min'|)/(2^(b-1) - 1), with code 2^(b-1) - 1 for 0.
    rate: of γ and β. start: their first value. decay: their weight decay.
    """

    def __init__(
        self, weight: Tensor, bits: int, groups: int, *, levels: int = 0, symmetric: bool = False, rate: float = 0.01,
        start: float = START, decay: float = 0.0,
    ) -> None:  # fmt: skip
        super().__init__()
        if symmetric and bits < 2:
            raise PosttrainError("symmetric clipping in 1 bit has no level beside 0; expected 2 to 8 bits")
        self.weight, self.bits, self.symmetric, self.rate, self.decay = weight, bits, symmetric, rate, decay
        self.top = (levels or 2**bits) - 1
        self.columns: ChannelScale | None = None
        self.owns = False
        self.low, self.high = grouped_range(weight, groups)
        self.upper = nn.Parameter(torch.full_like(self.high, start))
        self.lower = nn.Parameter(torch.full_like(self.low, start))

    def levels(self) -> tuple[Tensor, Tensor]:
        """Scale as it is stored, with its gradient, and zero: `[out, groups]` each."""
        low, high = self.ends()
        high, low = torch.sigmoid(self.upper) * high, torch.sigmoid(self.lower) * low
        if self.symmetric:
            middle = 2 ** (self.bits - 1) - 1
            scale = held((torch.maximum(high.abs(), low.abs()) / middle).clamp(NARROWEST, WIDEST))
            return scale, torch.full_like(scale, float(middle))
        scale = held(((high - low) / self.top).clamp(NARROWEST, WIDEST))
        return scale, torch.round(-low / scale).detach()

    def ends(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest weight of each group, `[out, groups]` each, as scaled now."""
        if self.columns is None:
            return self.low, self.high
        return grouped_range(self.weight * self.columns(), self.low.shape[1])

    def scale_columns(self, scale: ChannelScale, owns: bool) -> None:
        self.columns, self.owns = scale, owns

    def meant(self) -> Tensor:
        """The float weights that are rounded."""
        return self.weight if self.columns is None else self.weight * self.columns()

    def forward(self) -> Tensor:
        scale, zero = self.levels()
        return fake_quantized(self.meant(), scale, zero, self.top)

    @torch.no_grad()
    def pack(self) -> PackedWeight:
        scale, zero = self.levels()
        float_zero = bool((zero < 0).any() or (zero > self.top).any())
        if float_zero:
            zero = (-zero * scale).half().float()
        codes = nearest(self.meant(), scale, zero, self.top, float_zero)
        if self.top + 1 == 2**self.bits:
            return UniformWeight.of(codes, scale, zero, self.bits, "float" if float_zero else "integer")
        return LevelsWeight.of(codes, scale, zero, self.top + 1, float_zero)

    def groups(self) -> list[dict[str, Any]]:
        found = [{"params": [self.upper, self.lower], "lr": self.rate, "weight_decay": self.decay}]
        return [*found, *self.columns.groups()] if self.owns and self.columns is not None else found


@dataclass(frozen=True)
class LearnedClipping(WithScales):
    """OmniQuant's learnable weight clipping, block after block; where asked, with learned scales of channels.

    rate: learning rate of the clipping. symmetric: of the grid. start: of the clipping, before the sigmoid.

    Reference: OmniQuant, 2023, arXiv 2308.13137 (card 000, section 5).
    """

    rate: float = 0.01
    symmetric: bool = False
    start: float = START

    def soft(self, weight: Tensor, grid: Uniform, block: Block, name: str, known: Known) -> SoftWeight:
        groups = weight.shape[1] // grid.width(weight.shape[1], f"{block.name}.{name}")
        return ClippedRange(weight, int(grid.bits), groups, symmetric=self.symmetric, rate=self.rate, start=self.start)
