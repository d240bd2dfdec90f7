"""Norms, gated units, rotary positions of a layer, with gradients: the row-wise functions as operations of PyTorch.

Without gradients they are called outright: what autograd takes for an operation tells in a decode step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain.native.library import call, threads


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`x / sqrt(mean(x², last axis) + eps) * weight`, rounded to x's dtype before the product with the weight, as the
    norms of `transformers` are.
    """
    if not torch.is_grad_enabled():
        return _normed(x.contiguous(), weight.contiguous(), eps)[0]
    found: Tensor = _RMSNorm.apply(x, weight, eps)
    return found


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, the first factor rounded before the product."""
    if not torch.is_grad_enabled():
        return _gated(gate.contiguous(), up.contiguous())
    found: Tensor = _Gated.apply(gate, up)
    return found


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`x * cos + half(x) * sin` with `half` of (a, b) = (-b, a): x `[1, heads, N, width]`, cos and sin `[1, N, width]`,
    which take no gradient. It lies in memory as `[N, heads, width]`.
    """
    if not torch.is_grad_enabled():
        return _rotated(x, cos.contiguous(), sin.contiguous(), back=False)
    found: Tensor = _Rotated.apply(x, cos, sin)
    return found


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        x, weight = x.contiguous(), weight.contiguous()
        y, r = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Any, ...]:
        x, weight, r = ctx.saved_tensors
        width, count = x.shape[-1], threads(x.numel())
        d_x, d_weight = torch.empty_like(x), torch.zeros(count, width, device=x.device)
        call(
            "rms_norm_back", x.dtype, given.contiguous(), x, weight, r, d_x, d_weight, len(r), width, count=count
        )  # fmt: skip
        return d_x, d_weight.sum(0).to(weight.dtype), None


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Any, ...]:
        gate, up = ctx.saved_tensors
        d_gate, d_up, width = torch.empty_like(gate), torch.empty_like(up), gate.shape[-1]
        rows, count = gate.numel() // width, threads(gate.numel())
        call("gated_back", gate.dtype, given.contiguous(), gate, up, d_gate, d_up, rows, width, count=count)
        return d_gate, d_up


class _Rotated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, given: Tensor) -> tuple[Any, ...]:
        return _rotated(given, *ctx.saved_tensors, back=True), None, None


def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The norm of contiguous rows, and the factor `[rows]` fp32 of each."""
    width = x.shape[-1]
    rows = x.numel() // width
    y, r = torch.empty_like(x), torch.empty(rows, device=x.device)
    call("rms_norm", x.dtype, x, weight, y, r, rows, width, eps, count=threads(x.numel()))
    return y, r


def _gated(gate: Tensor, up: Tensor) -> Tensor:
    y, width = torch.empty_like(gate), gate.shape[-1]
    call("gated", gate.dtype, gate, up, y, gate.numel() // width, width, count=threads(gate.numel()))
    return y


def _rotated(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    if x.stride(3) != 1:
        x = x.contiguous()
    _, heads, rows, width = x.shape
    y = torch.empty(1, rows, heads, width, dtype=x.dtype, device=x.device)
    call(
        "rotated", x.dtype, x.data_ptr(), cos, sin, y, rows, heads, width, x.stride(2), x.stride(1), int(back),
        count=threads(x.numel()),
    )  # fmt: skip
    return y.transpose(1, 2)
