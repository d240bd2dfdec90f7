"""Attention over a packed layout, and over the slots of a decode cache, plugged into `transformers` models.

`transformers` models look their attention function up by name and hand it every extra keyword of `forward`; the one
registered here reads `packed_layout` (training, prefill) or `kv_slots` (decoding) from them. So any model that uses
the attention interface computes packed rows, with nothing of it patched.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.models.packing import Layout

NAME = "posttrain"
LONG = 1024  # from this many keys on, the tiled kernel of torch beats products of small matrices


class KeyValueSlots(Protocol):
    """A decode cache: takes the new keys and values of a layer and attends to all it holds."""

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, **options: Any) -> Tensor: ...


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packed_layout: Layout | None = None,
    kv_slots: KeyValueSlots | None = None,
    captured: dict[int, tuple[Tensor, Tensor]] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query `[1, heads, N, width]`, key and value `[1, key heads, N, width]` to `[1, N, heads, width]`."""
    if options.get("s_aux") is not None:
        raise NotImplementedError("attention sinks are not supported in packed rows")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    softcap = options.get("softcap")
    layer = int(getattr(module, "layer_idx", 0))
    if kv_slots is not None:
        return kv_slots.attend(layer, query, key, value, scale, softcap=softcap), None
    if packed_layout is None:
        raise RuntimeError("packed attention was called without a layout")
    if captured is not None:
        captured[layer] = (key[0], value[0])
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))  # [N, heads, width]
    out = q.new_empty(q.shape) if not q.requires_grad else None
    pieces, places = [], []
    for bucket in packed_layout.buckets:
        rows, width = bucket.query.shape
        bq = q.index_select(0, bucket.query.flatten()).view(rows, width, *q.shape[1:]).transpose(1, 2)
        bk = k.index_select(0, bucket.key.flatten()).view(rows, -1, *k.shape[1:]).transpose(1, 2)
        bv = v.index_select(0, bucket.key.flatten()).view(rows, -1, *v.shape[1:]).transpose(1, 2)
        found = attend(bq, bk, bv, bucket.mask, scale, softcap)
        found = found.transpose(1, 2).reshape(rows * width, *q.shape[1:]).index_select(0, bucket.query_rows)
        if out is not None:
            out[bucket.packed] = found
        pieces.append(found)
        places.append(bucket.packed)
    if out is None:
        order = torch.cat(places)
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        out = torch.cat(pieces).index_select(0, back)
    return out[None], None


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """Masked attention with grouped heads: q `[B, H, Q, D]`, k and v `[B, Hk, K, D]`, mask `[B, 1, Q, K]`."""
    if softcap is not None:
        groups = q.shape[1] // k.shape[1]
        scores = (q @ k.repeat_interleave(groups, 1).transpose(-1, -2)).float() * scale
        scores = torch.tanh(scores / softcap) * softcap
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(q.dtype)
        return weights @ v.repeat_interleave(groups, 1)
    if q.device.type != "cpu" or k.shape[2] >= LONG:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    return _GroupedAttention.apply(q, k, v, mask, scale)


class _GroupedAttention(torch.autograd.Function):
    """Products of small matrices with the heads of a group stacked as rows: on CPUs several times faster than the tiled
    kernel for short sequences. Weights are recomputed in the backward pass rather than kept.
    """

    @staticmethod
    def weights(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
        batch, heads, rows, width = q.shape
        kv = k.shape[1]
        scores = (q.reshape(batch, kv, -1, width) @ k.transpose(-1, -2)).float().mul_(scale)
        scores = scores.view(batch, heads, rows, -1).masked_fill_(~mask, float("-inf"))
        return torch.softmax(scores, -1).view(batch, kv, -1, k.shape[2])

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        weights = _GroupedAttention.weights(q, k, mask, scale)
        out = (weights.to(v.dtype) @ v).view(q.shape)
        ctx.save_for_backward(q, k, v, mask, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        q, k, v, mask, out = ctx.saved_tensors
        batch, _, _, width = q.shape
        kv = k.shape[1]
        weights = _GroupedAttention.weights(q, k, mask, ctx.scale)
        stacked = grad.reshape(batch, kv, -1, width)
        d_v = weights.to(v.dtype).transpose(-1, -2) @ stacked
        d_scores = (stacked @ v.transpose(-1, -2)).float()
        d_scores -= (grad.float() * out.float()).sum(-1).view(batch, kv, -1, 1)
        d_scores *= weights
        low = d_scores.mul_(ctx.scale).to(q.dtype)
        d_q = (low @ k).view(q.shape)
        d_k = low.transpose(-1, -2) @ q.reshape(batch, kv, -1, width)
        return d_q, d_k, d_v, None, None


@contextmanager
def packed_attention(model: nn.Module) -> Iterator[None]:
    """Let the model use the registered function inside the block, and its own outside."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [(c, c._attn_implementation) for c in configs.values() if hasattr(c, "_attn_implementation")]
    for config, _ in before:
        config._attn_implementation = NAME
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation
