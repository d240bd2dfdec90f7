"""Attention by products of small matrices, the heads of a group stacked as rows: on CPUs several times faster than the
tiled kernel for short sequences. Weights are recomputed in the backward pass rather than kept.

Throughout q is `[B, H, Q, D]`, k `[B, Hk, K, D]`, v `[B, Hk, K, Dv]`, the mask `[B, 1, Q, K]` (or of each head), and
what attention finds, as well as its gradient, `[B, H, Q, Dv]`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.native import library, softmax


class GroupedAttention(torch.autograd.Function):
    """Attention of one rectangle, as an operation of PyTorch."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        ctx.native = library.there_for(q, k, v) and mask.shape[1] == 1
        out = attended(q, k, v, mask, scale, native=ctx.native)
        ctx.save_for_backward(q, k, v, mask, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, mask, out = ctx.saved_tensors
        return *gradients(q, k, v, mask, out, grad, ctx.scale, native=ctx.native), None, None


def attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, *, native: bool) -> Tensor:
    """What attention finds; native: the softmax is the row-wise function."""
    weights = softmax.attention_weights(_scores(q, k), mask, scale) if native else _weights(q, k, mask, scale)
    stacked = weights.to(v.dtype).view(len(q), k.shape[1], -1, k.shape[2])
    return (stacked @ v).view(*q.shape[:3], v.shape[-1])


def gradients(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, out: Tensor, grad: Tensor, scale: float, *, native: bool
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Those of q, k and v from what was found and its gradient."""
    batch, kv = k.shape[:2]
    stacked = grad.reshape(batch, kv, -1, v.shape[-1])
    back = stacked @ v.transpose(-1, -2)
    if native:
        weights, low = _scores(q, k), back
        softmax.attention_gradients(weights, mask, low.view(weights.shape), out, stacked.view(out.shape), scale)
        weights = weights.view(back.shape)
    else:
        dot = (grad.float() * out.float()).sum(-1)
        weights = _weights(q, k, mask, scale).view(back.shape)
        low = back.float().sub_(dot.view(batch, kv, -1, 1)).mul_(weights).mul_(scale).to(q.dtype)
        weights = weights.to(v.dtype)
    d_v = weights.transpose(-1, -2) @ stacked
    d_q = (low @ k).view(q.shape)
    d_k = low.transpose(-1, -2) @ q.reshape(batch, kv, -1, q.shape[-1])
    return d_q, d_k, d_v


def _scores(q: Tensor, k: Tensor) -> Tensor:
    """Products of queries and keys, `[B, H, Q, K]`."""
    batch, heads, rows, width = q.shape
    return (q.reshape(batch, k.shape[1], -1, width) @ k.transpose(-1, -2)).view(batch, heads, rows, -1)


def _weights(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Attention weights in fp32, by PyTorch alone."""
    scores = _scores(q, k).float()
    # one pass in place scales and masks; filling by mask, or adding tensors of two dtypes, is several times slower
    bias = torch.zeros(mask.shape, device=q.device).masked_fill_(~mask, float("-inf"))
    torch.add(bias, scores, alpha=scale, out=scores)
    return torch.softmax(scores, -1)
