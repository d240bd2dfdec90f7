"""Large channels in a model that has none: small models do not grow the outliers that large ones are known for.

The function stays the same and only rounding sees a difference. Either what a norm gives is changed, and everything
that reads the norm undoes the change; or the residual stream is seen in the basis of its principal directions, in which
its channels are as unequal as the model made them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from posttrain.compress.calibrate import windows
from posttrain.compress.calls import Batch
from posttrain.compress.fold import change, parameters
from posttrain.compress.packed.linear import TransformedLinear
from posttrain.compress.stacks import Stack, replace_module, stacks
from posttrain.compress.structure import structure
from posttrain.compress.transforms.channels import ChannelStep
from posttrain.compress.transforms.rotation import rotate
from posttrain.compress.walk import Walk
from posttrain.models.causal import CausalPolicy

CHANNELS, FACTOR = 4, 30.0
SHIFTED, SHIFT, GAIN = 3, 20.0, 8.0
SCANNED, SCAN_FACTOR = 2, 50.0
ROWS, LENGTH = 32, 128  # of the text whose hidden states give the principal directions


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


def principal_channels(policy: CausalPolicy, seed: int) -> CausalPolicy:
    """The residual stream turned so that its channels are the principal directions of what the norms see of it, on text
    drawn by seed, the largest first; the norms' gains are folded.
    """
    from posttrain.lab.text import plain

    text = "\n".join(plain(20 * ROWS, seed))
    tokens = torch.tensor(policy.tokenizer.encode(text, add_special_tokens=False, verbose=False))
    rows = torch.stack(windows(tokens, ROWS, LENGTH, seed))
    model = policy.base
    (stack,) = stacks(model)
    moment = _second_moment(model, stack, rows)
    rotate(model, lambda width, centred: torch.linalg.eigh(moment).eigenvectors.flip(1))
    return policy


def _second_moment(model: nn.Module, stack: Stack, tokens: Tensor) -> Tensor:
    """`[width, width]` fp64 mean outer product of the blocks' inputs, each token at length 1."""
    found: list[Tensor] = []
    for block in Walk(model, stack, [{"input_ids": tokens, "use_cache": False}]):
        x = block.inputs[0].hidden.flatten(0, -2).double()
        x = x / x.norm(dim=-1, keepdim=True)
        found.append(x.T @ x / len(x))
    return torch.stack(found).mean(0)


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
    # to see what reads a norm any tokens will do
    plant(policy.base, {"input_ids": torch.arange(16)[None], "use_cache": False}, seed, channels, factor, shift)
    return policy


def plant(model: nn.Module, batch: Batch, seed: int, channels: int, factor: float, shift: float = 0.0) -> None:
    """Make channels of each norm's output `factor` times as large and move them by `shift`, in place.

    batch: the keyword arguments of a forward pass. The function stays the same, since all that reads a norm undoes it.
    """
    (stack,), draw = stacks(model), torch.Generator().manual_seed(seed)
    for block in Walk(model, stack, [batch]):
        for site in structure(block).norms:
            width = len(block.module.get_parameter(f"{site.norm}.weight"))
            scale, away = torch.ones(width), torch.zeros(width)
            chosen = torch.randperm(width, generator=draw)[:channels]
            scale[chosen], away[chosen] = 1 / factor, -shift / factor
            change(block.module, site.scaled(parameters(block.module), scale, away if shift else None))


def large_scan_outputs(policy: CausalPolicy, seed: int) -> CausalPolicy:
    """Two channels of what each state-space mixer gives its output layer, drawn by seed, fifty times as large: the
    gated outputs are multiplied when the model runs, and the layer's columns divided.
    """
    model, draw = policy.base, torch.Generator().manual_seed(seed)
    for name, layer in [(n, m) for n, m in model.named_modules() if hasattr(m, "A_log") and hasattr(m, "out_proj")]:
        step = ChannelStep(layer.out_proj.in_features)
        step.scale[torch.randperm(step.width, generator=draw)[:SCANNED]] = 1 / SCAN_FACTOR
        with torch.no_grad():
            layer.out_proj.weight.mul_(step.scale)
        replace_module(model, f"{name}.out_proj", TransformedLinear.of(layer.out_proj, nn.Sequential(step)))
    return policy
