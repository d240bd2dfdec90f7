"""Large channels in a model that has none: small models do not grow the outliers that large ones are known for.

What a norm gives is changed, and everything that reads the norm undoes the change, so that the function stays the same
and only rounding sees a difference.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from posttrain.compress.fold import change, parameters
from posttrain.compress.stacks import replace_module, stacks
from posttrain.compress.structure import structure
from posttrain.compress.walk import Walk
from posttrain.models.causal import CausalPolicy

CHANNELS, FACTOR = 4, 30.0
SHIFTED, SHIFT, GAIN = 3, 20.0, 8.0


def large_channels(policy: CausalPolicy, seed: int) -> CausalPolicy:
    """Four channels of each norm's output, drawn by seed, thirty times as large."""
    return _planted(policy, seed, CHANNELS, FACTOR, 0.0)


def one_sided_channels(policy: CausalPolicy, seed: int) -> CausalPolicy:
    """Three channels of each norm's output, drawn by seed, eight times as large and twenty away from 0. The norms get a
    bias for that, as a layer norm has one.
    """
    model = policy.base
    for name, norm in [(n, m) for n, m in model.named_modules() if type(m).__name__.endswith("RMSNorm")]:
        replace_module(model, name, BiasedNorm(norm))
    return _planted(policy, seed, SHIFTED, GAIN, SHIFT)


class BiasedNorm(nn.Module):
    """An RMS norm that adds a bias, 0 at first. norm: one with a `weight` and a `variance_epsilon`."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.epsilon = float(norm.variance_epsilon)  # type: ignore[arg-type]
        self.weight = nn.Parameter(norm.get_parameter("weight").detach().clone())
        self.bias = nn.Parameter(torch.zeros_like(self.weight))

    def forward(self, x: Tensor) -> Tensor:
        size = x.float().square().mean(-1, keepdim=True)
        return self.weight * (x.float() * torch.rsqrt(size + self.epsilon)).to(x.dtype) + self.bias


def _planted(policy: CausalPolicy, seed: int, channels: int, factor: float, shift: float) -> CausalPolicy:
    model, draw = policy.base, torch.Generator().manual_seed(seed)
    (stack,) = stacks(model)
    tokens = torch.arange(min(32, model.get_input_embeddings().num_embeddings))[None]  # type: ignore[operator]
    for block in Walk(model, stack, [{"input_ids": tokens, "use_cache": False}]):
        for site in structure(block).norms:
            width = len(block.module.get_parameter(f"{site.norm}.weight"))
            scale, away = torch.ones(width), torch.zeros(width)
            chosen = torch.randperm(width, generator=draw)[:channels]
            scale[chosen], away[chosen] = 1 / factor, -shift / factor
            change(block.module, site.scaled(parameters(block.module), scale, away if shift else None))
    return policy
