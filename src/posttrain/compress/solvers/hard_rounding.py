"""Learned rounding that trains what is stored, in one step forwards and one back, where no soft rounding is wanted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

HIGH, LOW = 1.1, -0.1  # ζ and ν: a sigmoid stretched, so that 0 and 1 are reached


class _HardRounded(torch.autograd.Function):
    """See `hard_rounded`. Shapes: weight and logits `[out, groups, n]`, scale and zero `[out, groups, 1]`."""

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, scale: Tensor, zero: Tensor, logits: Tensor, top: int, float_zero: bool, added: bool
    ) -> Tensor:
        place = (weight - zero).div_(scale) if float_zero else weight / scale
        codes = torch.floor(place)
        if added:
            share = (place - codes).sub_(LOW).div_(HIGH - LOW)
            logits = share.logit_().add_(logits)
        codes.add_(logits >= 0)
        if not float_zero:
            codes.add_(zero)
        inside = codes == codes.clamp(0, top)
        codes.clamp_(0, top)
        if not float_zero:
            codes.sub_(zero)
        ctx.save_for_backward(scale, place, codes, inside, logits)
        ctx.float_zero = float_zero
        return torch.addcmul(zero, codes, scale) if float_zero else codes * scale

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scale, place, codes, inside, logits = ctx.saved_tensors
        passed = grad * inside
        by_scale = by_logits = None
        if ctx.needs_input_grad[1]:
            by_scale = (grad * codes).addcmul_(passed, place, value=-1.0).sum(-1, keepdim=True)
        if ctx.needs_input_grad[3]:
            share = torch.sigmoid(logits)
            soft = share * (HIGH - LOW) + LOW
            slope = share.addcmul_(share, share, value=-1.0).mul_((soft >= 0) & (soft <= 1))
            by_logits = passed.mul_(slope).mul_(scale * (HIGH - LOW))
        return None, by_scale, None, by_logits, None, None, None


def hard_rounded(
    weight: Tensor, scale: Tensor, zero: Tensor, logits: Tensor, top: int, *, float_zero: bool = False,
    added: bool = False,
) -> Tensor:  # fmt: skip
    r"""`[out, in]` values s (clip(⌊w/s⌋ + [V >= 0] + z, 0, top) - z), differentiable in scale and logits.

    The gradient of [V >= 0] is that of h(V) = clip(1.2 σ(V) - 0.1, 0, 1); that of the scale passes straight through the
    rounding (see `fake_quantized`). scale, zero: `[out, groups]`; with a float zero values are s c + z.
    added: V is the logit of the fraction that ⌊w/s⌋ leaves, which has no gradient, plus `logits`; else it is `logits`.
    """
    by_group = weight.reshape(weight.shape[0], scale.shape[1], -1)
    found: Tensor = _HardRounded.apply(
        by_group, scale[..., None], zero[..., None], logits.reshape(by_group.shape), top, float_zero, added
    )
    return found.reshape(weight.shape)
