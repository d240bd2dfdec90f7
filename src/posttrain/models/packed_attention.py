"""Attention of a layer over all buckets of a packed row, on the CPU with the functions in C.

Tokens are copied once from the packed row into the rectangles that products of matrices want, and what is found once
back to it. Composed of PyTorch's operations the same is two to three copies each way, and as many additions of padded
rows in the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain.models.grouped_attention import attended, gradients
from posttrain.models.packing import Layout
from posttrain.native.gather import gather, scatter, scatter_add


def attend_packed(q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None, scale: float) -> Tensor:
    """q `[N, H, D]`, k `[N, Hk, D]`, v `[N, Hk, Dv]`, of any strides, all fp32 or bf16 as the library takes them, to
    `[N, H, Dv]`.
    """
    found: Tensor = _PackedAttention.apply(q, k, v, layout, window, scale)
    return found


class _PackedAttention(torch.autograd.Function):
    """Keeps the packed row rather than its rectangles, which are larger by their padding and by shared prompts."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, window: int | None, scale: float
    ) -> Tensor:  # fmt: skip
        q, k, v = (_with_rows(t) for t in (q, k, v))
        out = v.new_empty(*q.shape[:2], v.shape[2])
        for bucket in layout.buckets:
            for block in bucket.blocks(window):
                bq, bk, bv = gather(q, block.query), gather(k, block.key), gather(v, block.key)
                scatter(attended(bq, bk, bv, block.mask, scale, native=True), block.query, out)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*(_alone(t) for t in (q, k, v)), out)
        ctx.layout, ctx.window, ctx.scale = layout, window, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, out = ctx.saved_tensors
        grad = _with_rows(grad)
        blocks = [(bucket.whole, bucket.blocks(ctx.window)) for bucket in ctx.layout.buckets]
        # where no token is a key of two blocks, nothing is added up
        once = all(whole and len(parts) == 1 for whole, parts in blocks)
        d_q = torch.empty_like(q, memory_format=torch.contiguous_format)
        d_k, d_v = (
            torch.empty_like(t, memory_format=torch.contiguous_format)
            if once
            else torch.zeros(t.shape, dtype=torch.float32, device=t.device)
            for t in (k, v)
        )
        collect = scatter if once else scatter_add
        for block in (block for _, parts in blocks for block in parts):
            bq, bout, bgrad = (gather(t, block.query) for t in (q, out, grad))
            bk, bv = (gather(t, block.key) for t in (k, v))
            g_q, g_k, g_v = gradients(bq, bk, bv, block.mask, bout, bgrad, ctx.scale, native=True)
            scatter(g_q, block.query, d_q)
            collect(g_k, block.key, d_k)
            collect(g_v, block.key, d_v)
        return d_q, d_k.to(k.dtype), d_v.to(v.dtype), None, None, None


def _with_rows(x: Tensor) -> Tensor:
    """With rows that are contiguous each."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _alone(x: Tensor) -> Tensor:
    """Not a part of something larger, such as one projection to queries, keys and values, that it would keep alive."""
    return x if x.untyped_storage().nbytes() == x.nbytes else x.clone(memory_format=torch.contiguous_format)
