"""Learned step sizes: the scale of each group is trained, with or without the weights themselves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.packed.weight import PackedWeight
from posttrain.compress.solvers.learned import SoftWeight, fake_quantized, held_scale, nearest, straight_through
from posttrain.compress.solvers.reconstruct import Known, Reconstruction
from posttrain.compress.walk import Block
from posttrain.trajectory import PosttrainError


class LearnedStep(SoftWeight):
    r"""ŵ = s round(clip(w/s, Qn, Qp)) with Qn = -2^(b-1), Qp = 2^(b-1) - 1.

    s starts at 2 mean|w| / sqrt(Qp) and is trained as a factor of that, so that one learning rate suits every group;
    its gradient is multiplied by 1/sqrt(n Qp), n the group's weights.

    step_rate: learning rate of the factors. rate: of the weights, times their mean size; 0 leaves them as they are.
    """

    def __init__(self, weight: Tensor, bits: int, groups: int, *, step_rate: float, rate: float = 0.0) -> None:
        super().__init__()
        self.bits, self.rate, self.step_rate = bits, rate, step_rate
        self.top, self.highest = 2**bits - 1, 2 ** (bits - 1) - 1
        by_group = weight.reshape(weight.shape[0], groups, -1)
        self.start = initial_step(by_group, self.highest)
        self.gradient_scale = (by_group.shape[-1] * self.highest) ** -0.5
        self.size = float(weight.abs().mean())
        self.factor = nn.Parameter(torch.ones_like(self.start))
        self.weight = nn.Parameter(weight.clone(), requires_grad=rate > 0)

    def levels(self) -> tuple[Tensor, Tensor]:
        """Scale as it is stored, with its gradient, and zero: `[out, groups]` each."""
        scale = held_scale(self.start * straight_through(self.factor, self.factor * self.gradient_scale))
        return scale, torch.full_like(scale, float(self.top - self.highest))

    def forward(self) -> Tensor:
        return fake_quantized(self.weight, *self.levels(), self.top, clip_first=True)

    @torch.no_grad()
    def pack(self) -> PackedWeight:
        scale, zero = self.levels()
        return UniformWeight.of(nearest(self.weight, scale, zero, self.top), scale, zero, self.bits, "none")

    def groups(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = [{"params": [self.factor], "lr": self.step_rate}]
        return [*found, {"params": [self.weight], "lr": self.rate * self.size}] if self.rate > 0 else found


def initial_step(by_group: Tensor, highest: int) -> Tensor:
    """LSQ's first step of `[out, groups, n]` weights: `[out, groups]`, 2 mean|w| / sqrt(Qp); 1 for a group of zeros."""
    step = 2 * by_group.abs().mean(-1) / highest**0.5
    return torch.where(step > 0, step, torch.ones_like(step))


@dataclass(frozen=True)
class LearnedSteps(Reconstruction):
    """LSQ, with a block's outputs as what is learned from.

    step_rate: learning rate of the steps, as shares of their first values. rate: of the weights, as a share of their
    mean size; 0 trains the steps alone.

    Reference: Learned step size quantization, 2019, arXiv 1902.08153 (card 000, section 10).
    """

    step_rate: float = 0.01
    rate: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.grid.bits < 2:
            raise PosttrainError(f"bits is {self.grid.bits}; learned steps have 2 to 8 (one bit has no level above 0)")

    def soft(self, weight: Tensor, grid: Uniform, block: Block, name: str, known: Known) -> SoftWeight:
        groups = weight.shape[1] // grid.width(weight.shape[1], f"{block.name}.{name}")
        return LearnedStep(weight, int(grid.bits), groups, step_rate=self.step_rate, rate=self.rate)
