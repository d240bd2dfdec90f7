"""Attention maps of blocks while they run, through the attention interface of `transformers`; nothing is patched."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

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
        weights = probabilities(module, query, key, attention_mask, **options)
        found.append(weights.mean(1))
        heads = query.shape[1] // value.shape[1]
        out = weights.to(value.dtype) @ value.repeat_interleave(heads, 1)
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


def probabilities(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **options: Any,
) -> Tensor:
    """`[rows, heads, queries, keys]` fp32, of query `[rows, heads, queries, width]` and key `[rows, key heads, ...]`.

    mask: boolean (True may be seen) or added to the scores. Without one, a causal layer of several queries looks back.
    """
    if any(options.get(name) is not None for name in ("s_aux", "position_bias")):
        raise NotImplementedError("attention sinks and position biases have no map that could be compared")
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query @ keys.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    causal = options.get("is_causal")
    if mask is not None:
        mask = mask[..., : keys.shape[2]]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.float()
    elif query.shape[2] > 1 and (getattr(module, "is_causal", True) if causal is None else causal):
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if sliding_window:
            seen = seen.triu(1 - int(sliding_window))
        scores = scores.masked_fill(~seen, -torch.inf)
    return scores.softmax(-1)
