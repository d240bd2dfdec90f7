"""What stands for a weight while it is trained: rounding with straight-through gradients, and its place in a block.

Source of the gradients: card 000, sections 5 and 10.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from posttrain.compress.grids.uniform import Uniform, UniformLevels
from posttrain.compress.packed.inputs import InputStep
from posttrain.compress.packed.linear import TransformedLinear
from posttrain.compress.packed.weight import PackedWeight

SMALLEST = 2.0**-20  # of a learned scale, well inside what half precision holds


class ChannelScale(nn.Module):
    """`[width]` positive scales of channels, learned as logarithms. rate: their learning rate."""

    def __init__(self, start: Tensor, rate: float) -> None:
        super().__init__()
        self.log, self.rate = nn.Parameter(start.log()), rate

    def forward(self) -> Tensor:
        return self.log.exp()

    def groups(self) -> list[dict[str, Any]]:
        """As of a `SoftWeight`."""
        return [{"params": [self.log], "lr": self.rate}]


class SoftWeight(nn.Module, ABC):
    """A learnable stand-in for one weight matrix, which becomes a packed one by a fixed rule.

    committed: what `forward` gives are the values that would be stored now, where it otherwise gives softer ones.
    """

    committed = False

    @abstractmethod
    def forward(self) -> Tensor:
        """`[out, in]`, differentiable in what is learned."""

    @abstractmethod
    def pack(self) -> PackedWeight:
        """The packed weight of what was learned; scales are rounded to how they are stored before the codes."""

    @abstractmethod
    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's parameter groups: `params`, `lr`, and where there is any `weight_decay`."""

    def penalty(self, progress: float) -> Tensor | None:
        """What is added to the loss. progress: share of the training that is done, 0 to 1."""
        return None

    def scale_columns(self, scale: ChannelScale, owns: bool) -> None:
        """Multiply the float weight by learned scales from now on. owns: whether `groups` has them, too."""
        raise NotImplementedError(f"{type(self).__name__} does not scale its columns")

    def product(self, x: Tensor) -> Tensor:
        """`[..., in]` -> `[..., out]`, in the inputs' dtype: what is rounded in fp32 is multiplied as it will be."""
        return F.linear(x, self().to(x.dtype))


class SoftLinear(nn.Module):
    """A linear layer of a block in training: the steps that its inputs go through, and a soft weight.

    Input quantizers pass their gradient straight through. columns: gives learned scales, `[in]`, that the inputs are
    divided by before they are rounded.
    """

    def __init__(self, soft: SoftWeight, linear: nn.Linear, quantizer: InputStep | None = None) -> None:
        super().__init__()
        self.columns: ChannelScale | None = None
        self.soft, self.quantizer = soft, quantizer
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.steps = nn.ModuleList(linear.inputs) if isinstance(linear, TransformedLinear) else nn.ModuleList()
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        if self.columns is not None:
            x = (x / self.columns()).to(x.dtype)
        if self.quantizer is not None:
            x = straight_through(self.quantizer(x), x)
        y = self.soft.product(x)
        return y if self.bias is None else y + self.bias


class _FakeQuantized(torch.autograd.Function):
    """`s (c - z)` or, with a float zero, `s c + z`, where c = clip(round(v), 0, top) (or floor(v) + delta for round).

    Shapes: weight and delta `[out, groups, n]`, scale and zero `[out, groups, 1]`. The rounding passes its gradient
    straight through, the clipping does not.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor, delta: Tensor | None, top: int, float_zero: bool,
        clip_first: bool,
    ) -> Tensor:  # fmt: skip
        place = (weight - zero).div_(scale) if float_zero else weight / scale
        codes = torch.round(place) if delta is None else torch.floor(place).add_(delta)
        if not float_zero:
            codes.add_(zero)
        if clip_first:
            at = place if float_zero else place + zero
            inside = (at >= 0) & (at <= top)
        else:
            inside = (codes >= 0) & (codes <= top)
        codes.clamp_(0, top)
        ctx.save_for_backward(weight, scale, zero, codes, inside)
        ctx.float_zero, ctx.has_delta = float_zero, delta is not None
        return codes * scale + zero if float_zero else (codes - zero).mul_(scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, zero, codes, inside = ctx.saved_tensors
        passed = grad * inside
        by_scale = by_zero = None
        if ctx.needs_input_grad[1]:
            place = (weight - zero).div_(scale) if ctx.float_zero else weight / scale
            value = codes if ctx.float_zero else codes - zero
            by_scale = (grad * value).sub_(passed * place).sum(-1, keepdim=True)
        if ctx.float_zero and ctx.needs_input_grad[2]:
            by_zero = (grad - passed).sum(-1, keepdim=True)
        by_delta = passed * scale if ctx.has_delta and ctx.needs_input_grad[3] else None
        return passed if ctx.needs_input_grad[0] else None, by_scale, by_zero, by_delta, None, None, None


def fake_quantized(
    weight: Tensor, scale: Tensor, zero: Tensor, top: int, *, float_zero: bool = False, clip_first: bool = False,
    delta: Tensor | None = None,
) -> Tensor:  # fmt: skip
    r"""`[out, in]` weights on their grid, differentiable by the straight-through estimator.

    With v = w/s + z (or (w - z)/s where the zero is a float), c = clip(round(v), 0, top) and M = [v is not clipped]:

        ∂ŵ/∂w = M,   ∂ŵ/∂s = (c - z) - M w/s   (c - M v with a float zero),   ∂ŵ/∂z = 1 - M for a float zero, else 0.

    scale, zero: `[out, groups]`; an integer zero is a constant. top: the highest code. clip_first: a value between the
    top level and half a step above counts as clipped (LSQ), else not (clipping what is rounded already).
    delta: `[out, in]`; codes are ⌊v⌋ + delta in the place of round(v), and ∂ŵ/∂delta = s M.
    """
    by_group = weight.reshape(weight.shape[0], scale.shape[1], -1)
    more = None if delta is None else delta.reshape(by_group.shape)
    found = _FakeQuantized.apply(by_group, scale[..., None], zero[..., None], more, top, float_zero, clip_first)
    return found.reshape(weight.shape)


def nearest(weight: Tensor, scale: Tensor, zero: Tensor, top: int, float_zero: bool = False) -> Tensor:
    """`[out, in]` int64 codes of the nearest levels: those that `fake_quantized` gives its values by."""
    by_group = weight.reshape(weight.shape[0], scale.shape[1], -1)
    levels = UniformLevels(scale[..., None], zero[..., None], top, float_zero)
    return levels.nearest(by_group).reshape(weight.shape)


def straight_through(hard: Tensor, soft: Tensor) -> Tensor:
    """Exactly the first, with the gradient of the second."""
    return hard.detach() + (soft - soft.detach())


def held(values: Tensor) -> Tensor:
    """Values as half precision holds them, with the gradient passed straight through: training sees what is stored."""
    return straight_through(values.half().to(values.dtype), values)


def held_scale(scale: Tensor) -> Tensor:
    """A learned scale as it is stored, kept above zero."""
    return held(scale.clamp(min=SMALLEST, max=60000.0))


def fitted(weight: Tensor, grid: Uniform, name: str) -> tuple[Tensor, Tensor]:
    """Scale and zero, `[out, groups]` fp32 each, of a grid fitted to each group of a weight."""
    levels = [grid.fit(group) for group in weight.split(grid.width(weight.shape[1], name), 1)]
    return torch.cat([level.scale for level in levels], 1), torch.cat([level.zero for level in levels], 1)


def grouped_range(weight: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest weight of each group, `[out, groups]` each."""
    by_group = weight.reshape(weight.shape[0], groups, -1)
    return by_group.amin(-1), by_group.amax(-1)
