"""NUPES: the exponent of a power grid and the codes themselves, over all of their range, learned block by block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.compress.grids.power import LEAST, Power, companded, packed_power, peaks
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.packed.weight import PackedWeight
from posttrain.compress.solvers.learned import SoftWeight
from posttrain.compress.solvers.reconstruct import Known, Reconstruction
from posttrain.compress.walk import Block
from posttrain.trajectory import PosttrainError

SOFT, HARD, WARM = 2.0, 50.0, 0.2  # sharpness of the rounding at first and at last; share of the steps before it rises
GREATEST = 1.2  # exponent


class PowerCodes(SoftWeight):
    r"""`ŵ = m sign(r) (|r| / L)^(1/a)` with r a soft rounding of latent codes t, which may travel over all codes.

        r(t) = ⌊t⌋ + σ_τ(t - ⌊t⌋ - 1/2),  σ_τ a sigmoid of sharpness τ, moved and stretched to go from 0 to 1

    t starts at the code before rounding. m = max|w| of each row (or group) stays.

    rate: of t, in steps of the code. exponent_rate: of a; 0 for either leaves it as it is.
    """

    def __init__(self, weight: Tensor, grid: Power, *, rate: float, exponent_rate: float) -> None:
        super().__init__()
        settled = grid.settled(weight)
        assert settled.exponent is not None
        self.bits, self.top, self.shape = grid.bits, grid.top, tuple(weight.shape)
        self.rate, self.exponent_rate, self.sharpness = rate, exponent_rate, SOFT
        by_group = weight.reshape(-1, grid.width(weight.shape[1]))
        self.scale = peaks(by_group)
        latent = companded(by_group, self.scale, settled.exponent, self.top)
        self.latent = nn.Parameter(latent, requires_grad=rate > 0)
        start = torch.tensor(settled.exponent, dtype=torch.float64)  # its table is made in fp64
        self.exponent = nn.Parameter(start, requires_grad=exponent_rate > 0)

    def forward(self) -> Tensor:
        codes = self.hard() if self.committed else soft_rounded(self.latent.clamp(-self.top, self.top), self.sharpness)
        return power_values(codes / self.top, self.scale, self.held_exponent()).view(self.shape)

    def hard(self) -> Tensor:
        """The codes that would be stored now, from -L to L."""
        return torch.round(self.latent.detach()).clamp(-self.top, self.top)

    def held_exponent(self) -> Tensor:
        return self.exponent.clamp(LEAST, GREATEST)

    def pack(self) -> PackedWeight:
        rows = self.shape[0]
        codes = (self.hard().long() + self.top).view(self.shape)
        return packed_power(codes, self.scale.view(rows, -1), self.held_exponent().item(), self.bits)

    def groups(self) -> list[dict[str, Any]]:
        learned = [(self.latent, self.rate), (self.exponent, self.exponent_rate)]
        return [{"params": [parameter], "lr": rate} for parameter, rate in learned if rate > 0]

    def penalty(self, progress: float) -> Tensor | None:
        self.sharpness = SOFT + (HARD - SOFT) * max(0.0, progress - WARM) / (1 - WARM)
        return None


def soft_rounded(latent: Tensor, sharpness: float) -> Tensor:
    """A rounding with a slope: exact at whole numbers and halfway between them."""
    floor = torch.floor(latent).detach()
    end = torch.sigmoid(torch.tensor(sharpness / 2))
    rising = torch.sigmoid(sharpness * (latent - floor - 0.5))
    return floor + (rising - (1 - end)) / (2 * end - 1)


def power_values(shares: Tensor, scale: Tensor, exponent: Tensor) -> Tensor:
    r"""`m sign(v) |v|^(1/a)` of codes v as shares of the largest, with ∂/∂a = -a^-2 |v|^(1/a) ln|v|, 0 at v = 0."""
    sizes = shares.abs()
    there = sizes > 0
    back = torch.where(there, sizes, torch.ones_like(sizes)) ** (1 / exponent)
    return torch.where(there, scale * shares.sign() * back, torch.zeros_like(back))


@dataclass(frozen=True)
class LearnedPower(Reconstruction):
    """NUPES with data.

    grid: its bits and group are those of the power grid. exponent: where a starts; None searches it. rate: of the
    codes, in steps of the code. exponent_rate: of a.

    Reference: NUPES, 2023, arXiv 2308.05600 (card 024).
    """

    exponent: float | None = None
    rate: float = 0.1
    exponent_rate: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        Power(int(self.grid.bits), self.grid.group, self.exponent)  # says what is wrong with them
        if self.rate < 0 or self.exponent_rate < 0 or self.rate + self.exponent_rate == 0:
            raise PosttrainError(
                f"rate {self.rate}, exponent_rate {self.exponent_rate}: expected one above 0, none below"
            )

    def soft(self, weight: Tensor, grid: Uniform, block: Block, name: str, known: Known) -> SoftWeight:
        power = Power(int(grid.bits), grid.group, self.exponent)
        return PowerCodes(weight, power, rate=self.rate, exponent_rate=self.exponent_rate)
