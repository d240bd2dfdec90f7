"""Attention of a decode step over the slots of a cache, which takes the new keys and values."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.native import library
from posttrain.native.library import call, threads

HEADS = 4  # query heads that share a reading of the keys, as in the source


def suits(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether `attend` can take these."""
    return library.there_for(query, key, value, keys, values) and keys.is_contiguous() and values.is_contiguous()


def attend(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, at: Tensor, scale: float,
    window: int | None = None,
) -> Tensor:  # fmt: skip
    """Write the new key `[rows, key heads, 1, width]` and value `[rows, key heads, 1, value width]` to token `at`
    `[rows]` int64 of keys `[rows, key heads, room, width]` and values, and attend from query `[rows, heads, 1, width]`
    to the tokens up to there (the last `window` of them): `[rows, 1, heads, value width]`, rounded once.
    """
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    (rows, heads, _, width), (_, kv_heads, room, value_width) = query.shape, values.shape
    count = threads(rows * heads * room)
    wide = HEADS * (32 + width + 16 + room)  # queries and scores, each up to the next whole vectors
    held = query.new_empty(count, wide, dtype=torch.float32)
    out = query.new_empty(rows, 1, heads, value_width)
    call(
        "slot_attention", query.dtype, query.data_ptr(), key.data_ptr(), value.data_ptr(), keys, values, at, held, out,
        rows, kv_heads, heads // kv_heads, room, width, value_width, *query.stride()[:2], *key.stride()[:2],
        *value.stride()[:2], room if window is None else window, scale, count=count,
    )  # fmt: skip
    return out
