"""Attention over a packed layout, and over the slots of a decode cache, plugged into `transformers` models.

`transformers` models look their attention function up by name and hand it every extra keyword of `forward`; the one
registered here reads `packed_layout` (training, prefill) or `kv_slots` (decoding) from them. So any model that uses
the attention interface computes packed rows, with nothing of it patched. What a layer asks for is honoured (scale,
grouped heads, sliding window, soft cap); what it asks for and is not known here is an error, never ignored. Dropout on
attention weights is not applied: log-probabilities of training are those of sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.models import device_attention
from posttrain.models.grouped_attention import GroupedAttention
from posttrain.models.layers import Forward, replaced, replacements
from posttrain.models.packed_attention import attend_packed
from posttrain.models.packing import Bucket, Layout
from posttrain.models.rotary import Rotations, rotating, rotations
from posttrain.native import library

NAME = "posttrain"
LONG = 1024  # from this many keys on, the tiled kernel of torch beats products of small matrices


class TokenChoice(Protocol):
    """Which of the keys it may see a query attends to, where a layer has one in its attention module's `token_choice`:
    chosen for each head by labels of the keys, which a decode cache keeps beside them. A prompt is read whole.
    """

    def labels(self, key: Tensor) -> Tensor:
        """`[rows, key heads, N, width]` to `[rows, heads, N, label width]`."""
        ...

    def within(self, query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        """Which keys each query of `[B, heads, Q, width]` attends to: `[B, heads, Q, K]`, a part of the mask `[B, 1, Q,
        K]`.
        """
        ...

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, labels: Tensor, visible: Tensor, scale: float,
        softcap: float | None = None,
    ) -> Tensor:  # fmt: skip
        """A decode step: query `[rows, heads, 1, width]`, contiguous key and value `[rows, key heads, K, width]`,
        visible `[rows, 1, 1, K]` bool to `[rows, heads, 1, value width]`.
        """
        ...


class LayerState(NamedTuple):
    """What a layer's attention was given: key and value `[key heads, N, width]`, its sliding window if any, and what
    chooses tokens in it if anything does.
    """

    key: Tensor
    value: Tensor
    window: int | None
    choice: TokenChoice | None = None


class KeyValueSlots(Protocol):
    """A decode cache: takes the new keys and values of a layer and attends to what it holds within the window."""

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
        choice: TokenChoice | None = None,
    ) -> Tensor: ...


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    packed_layout: Layout | None = None,
    kv_slots: KeyValueSlots | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    captured: dict[int, LayerState] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query `[1, heads, N, width]`, key `[1, key heads, N, width]` and value `[1, key heads, N, value width]` to
    `[1, N, heads, value width]`. Other options may be there, but not set (`dropout` aside).
    """
    if attention_mask is not None or any(options.get(name) is not None for name in ("s_aux", "position_bias")):
        raise NotImplementedError("attention sinks, biases and a model's own masks are not supported in packed rows")
    if getattr(module, "attention_rounding", None) is not None:  # which the model's own attention function heeds
        raise NotImplementedError("rounded attention is not computed in packed rows")
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    window = int(sliding_window) if sliding_window else None
    layer = int(getattr(module, "layer_idx", None) or 0)
    choice: TokenChoice | None = getattr(module, "token_choice", None)
    if kv_slots is not None:
        return kv_slots.attend(layer, query, key, value, scale, window=window, softcap=softcap, choice=choice), None
    if packed_layout is None:
        raise RuntimeError("packed attention was called without a layout")
    if captured is not None:
        if layer in captured:
            raise NotImplementedError(f"layer {layer} attends more than once")
        captured[layer] = LayerState(key[0], value[0], window, choice)
        choice = None  # a prompt is read whole
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))  # [N, heads, width]
    if softcap is None and choice is None and _takes_rows(q, k, v, packed_layout):
        return attend_packed(q, k, v, packed_layout, window, scale)[None], None
    pieces = [_attend_bucket(b, q, k, v, window, scale, softcap, choice) for b in packed_layout.buckets]
    if any(p.requires_grad for p in pieces):
        order = torch.cat([b.packed for b in packed_layout.buckets])
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order), device=order.device)
        return torch.cat(pieces).index_select(0, back)[None], None
    out = v.new_empty(*q.shape[:2], v.shape[-1])
    for bucket, piece in zip(packed_layout.buckets, pieces, strict=True):
        out[bucket.packed] = piece
    return out[None], None


def _takes_rows(q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> bool:
    """Whether the functions in C compute a whole layer: on the CPU, where no row is so long that it wants tiles."""
    return (
        library.there_for(q, k, v)
        and not device_attention.suits(q)
        and all(bucket.key.shape[1] < LONG for bucket in layout.buckets)
    )


def _attend_bucket(
    bucket: Bucket, q: Tensor, k: Tensor, v: Tensor, window: int | None, scale: float, softcap: float | None,
    choice: TokenChoice | None,
) -> Tensor:  # fmt: skip
    """Attention of one bucket: q, k, v `[N, heads, width]` to `[queries of the bucket, heads, value width]`."""
    rows, width = bucket.query.shape
    bq = q.index_select(0, bucket.query.flatten()).view(rows, width, *q.shape[1:]).transpose(1, 2)
    bk = k.index_select(0, bucket.key.flatten()).view(rows, -1, *k.shape[1:]).transpose(1, 2)
    bv = v.index_select(0, bucket.key.flatten()).view(rows, -1, *v.shape[1:]).transpose(1, 2)
    mask = bucket.within(window)
    causal = bucket.whole and mask is bucket.mask and choice is None
    if choice is not None:
        mask = choice.within(bq, bk, mask)
    if softcap is None and device_attention.suits(bq):
        found = device_attention.attend(bq, bk, bv, mask, scale, causal)
    else:
        found = attend(bq, bk, bv, mask, scale, softcap)
    return found.transpose(1, 2).flatten(0, 1).index_select(0, bucket.query_rows)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap: float | None = None) -> Tensor:
    """Masked attention with grouped heads: q `[B, H, Q, D]`, k `[B, Hk, K, D]`, v `[B, Hk, K, Dv]`, mask
    `[B, 1, Q, K]` (or of each head) to `[B, H, Q, Dv]`.
    """
    if softcap is not None:
        groups = q.shape[1] // k.shape[1]
        scores = (q @ k.repeat_interleave(groups, 1).transpose(-1, -2)).float() * scale
        scores = torch.tanh(scores / softcap) * softcap
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1).to(q.dtype)
        return weights @ v.repeat_interleave(groups, 1)
    if q.device.type != "cpu" or k.shape[2] >= LONG:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=True)
    found: Tensor = GroupedAttention.apply(q, k, v, mask, scale)
    return found


@contextmanager
def packed_attention(model: nn.Module) -> Iterator[None]:
    """Let the model use the registered function inside the block, and its own outside; and the row-wise functions for
    its norms, gated units and rotary positions.

    Layers under gradient checkpointing are computed again in the backward pass, when the block is over; they use the
    registered function then, too.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)
    configs, rowwise, rotary = attention_configs(model), replacements(model), rotations(model)
    checkpoints = [
        (m, function)
        for m in model.modules()
        if (function := m.__dict__.get("_gradient_checkpointing_func")) is not None
    ]
    for module, function in checkpoints:
        module._gradient_checkpointing_func = partial(  # type: ignore[assignment]
            _checkpoint, function, configs, rowwise, rotary
        )
    try:
        with implementation(configs), replaced(rowwise), rotating(rotary):
            yield
    finally:
        for module, function in checkpoints:
            module._gradient_checkpointing_func = function


def attention_configs(model: nn.Module) -> list[Any]:
    """The configurations that say by which function a model's layers attend."""
    found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    return [c for c in found.values() if hasattr(c, "_attn_implementation")]


@contextmanager
def implementation(configs: list[Any], name: str = NAME) -> Iterator[None]:
    """The registered function of that name inside the block, and what there was before outside."""
    before = [c._attn_implementation for c in configs]
    for config in configs:
        config._attn_implementation = name
    try:
        yield
    finally:
        for config, own in zip(configs, before, strict=True):
            config._attn_implementation = own


def _checkpoint(
    checkpoint: Callable[..., Any],
    configs: list[Any],
    rowwise: list[tuple[nn.Module, Forward]],
    rotary: Rotations,
    layer: Callable[..., Any],
    *args: Any,
) -> Any:
    def packed_layer(*inputs: Any) -> Any:
        with implementation(configs), replaced(rowwise), rotating(rotary):
            return layer(*inputs)

    return checkpoint(packed_layer, *args)
