"""Attention maps of blocks while they run, through the attention interface of `transformers`; nothing is patched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

NAME = "posttrain-maps"


@contextmanager
def watched_attention(blocks: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """Inside, each attention layer of the blocks adds its map to the list that is yielded: `[rows, queries, keys]`
    probabilities in fp32, averaged over heads, with their gradient. The list of no blocks stays empty, as does that of
    layers that attend in a way of their own.
    """
    found: list[Tensor] = []
    if not blocks:
        yield found
        return
    from transformers import AttentionInterface

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        scores = scores_of(module, query, key, attention_mask, **options)
        out, weights = _Attended.apply(scores, value.repeat_interleave(query.shape[1] // value.shape[1], 1))
        found.append(weights)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register(NAME, attend)
    modules = [m for block in blocks for m in block.modules()]
    named: dict[int, Any] = {id(c): c for m in modules if (c := getattr(m, "config", None)) is not None}
    configs = [c for c in named.values() if hasattr(c, "_attn_implementation")]
    before = [c._attn_implementation for c in configs]
    for config in configs:
        config._attn_implementation = NAME
    try:
        yield found
    finally:
        for config, implementation in zip(configs, before, strict=True):
            config._attn_implementation = implementation


class _Attended(torch.autograd.Function):
    """`softmax(scores) values`, `[rows, heads, queries, width]`, and the mean of the probabilities over heads.

    On the way back the gradients of both are added in one tensor, where autograd would write each anew.
    """

    @staticmethod
    def forward(ctx: Any, scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        weights = scores.softmax(-1)
        ctx.save_for_backward(weights, values)
        return weights.to(values.dtype) @ values, weights.mean(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, by_output: Tensor, by_map: Tensor) -> tuple[Tensor, Tensor]:
        weights, values = ctx.saved_tensors
        by_weights = (by_output @ values.transpose(-1, -2)).float()
        by_weights += (by_map / weights.shape[1]).unsqueeze(1)
        by_scores = torch._softmax_backward_data(by_weights, weights, -1, weights.dtype)
        return by_scores, weights.to(values.dtype).transpose(-1, -2) @ by_output


def probabilities(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, **options: Any) -> Tensor:
    """`[rows, heads, queries, keys]` fp32: the softmax of `scores_of`."""
    return scores_of(module, query, key, mask, **options).softmax(-1)


def scores_of(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> Tensor:
    """`[rows, heads, queries, keys]` fp32 scores before the softmax, of query `[rows, heads, queries, width]` and key
    `[rows, key heads, ...]`.

    mask: boolean (True may be seen) or added to the scores. Without one, a causal layer of several queries looks back.
    """
    if any(options.get(name) is not None for name in ("s_aux", "position_bias")):
        raise NotImplementedError("attention sinks and position biases have no map that could be compared")
    rows, heads, queries, width = query.shape
    keys = key.repeat_interleave(heads // key.shape[1], 1)
    scale = width**-0.5 if scaling is None else scaling
    causal = options.get("is_causal")
    if mask is not None:
        mask = mask[..., : keys.shape[2]]
    elif queries > 1 and (getattr(module, "is_causal", True) if causal is None else causal):
        mask = torch.ones(queries, keys.shape[2], dtype=torch.bool, device=query.device).tril()
        if sliding_window:
            mask = mask.triu(1 - int(sliding_window))
    if softcap is not None:
        scores = torch.tanh((query @ keys.transpose(-1, -2)).float() * (scale / softcap)) * softcap
        return scores if mask is None else scores + _added(mask, torch.float32)
    flat = query.reshape(-1, queries, width), keys.reshape(-1, *keys.shape[2:]).transpose(1, 2)
    if mask is None:
        scores = (flat[0] @ flat[1]) * scale
    else:  # masked as the product is written, in place of two more passes over what it gives
        added = _added(mask, query.dtype)
        added = added.expand(rows, heads, -1, -1).reshape(-1, *added.shape[-2:]) if added.ndim == 4 else added[None]
        scores = torch.baddbmm(added, *flat, alpha=scale)
    return scores.view(rows, heads, queries, -1).float()


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a mask adds to scores."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)
