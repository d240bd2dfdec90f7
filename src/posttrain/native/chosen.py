"""Attention of a decode step to few tokens of a cache, which labels of their keys choose."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.native import library
from posttrain.native.library import call, threads


def suits(query: Tensor, keys: Tensor, values: Tensor, labels: Tensor) -> bool:
    """Whether `attend` can take these."""
    there = library.there_for(query, keys, values) and labels.dtype in (query.dtype, torch.int32)
    return there and all(t.is_contiguous() for t in (keys, values, labels))


def attend(
    query: Tensor, keys: Tensor, values: Tensor, labels: Tensor, channels: Tensor, label_bits: int, visible: Tensor,
    tokens: int, recent: int, scale: float,
) -> Tensor:  # fmt: skip
    """Query `[rows, heads, 1, width]` attends to `tokens` of the keys `[rows, key heads, room, width]` that it may see:
    those whose labels have the largest products with its own (of equal ones the earlier token), and the newest `recent`
    ones in any case. channels: `[heads, r]` int16, of which its label is made; labels: `[rows, heads, room, r]` in the
    query's dtype, or packed (`compress/token_labels.py`). visible: `[rows, 1, 1, room]` bool. Returns `[rows, heads, 1,
    value width]`, rounded once.
    """
    query = query if query.stride(3) == 1 else query.contiguous()
    (rows, heads, _, width), (_, kv_heads, room, value_width), r = query.shape, values.shape, channels.shape[1]
    words = labels.shape[3] - 3 if labels.dtype == torch.int32 else 0
    if words % 2 or (8 * words < r if words else labels.shape[3] != r):
        raise ValueError(f"labels are {list(labels.shape)} of {labels.dtype}; expected such of {r} channels")
    count = threads(rows * heads * room)
    held = query.new_empty(count, 3 * (room + 16) + width + 2 * r + 80, dtype=torch.float32)
    out = query.new_empty(rows, heads, 1, value_width)
    call(
        "chosen_attention", query.dtype, query.data_ptr(), channels, keys, values, labels,
        visible.expand(rows, 1, 1, room).contiguous(), held, out, rows, kv_heads, heads // kv_heads, room, width,
        value_width, r, words, label_bits, *query.stride()[:2], tokens, recent, scale, count=count,
    )  # fmt: skip
    return out
