"""Attention of a bucket's segments on a GPU, by torch's fused kernels.

The fastest of them (flash attention) takes grouped heads and knows no mask but the causal one; the memory-efficient
one takes masks and no grouped heads.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FUSED = (torch.bfloat16, torch.float16)  # fp32 is asked for where exactness is


def suits(query: Tensor) -> bool:
    """Whether these kernels are there for it."""
    return query.is_cuda and query.dtype in FUSED


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, causal: bool) -> Tensor:
    """q `[B, H, Q, D]`, k `[B, Hk, K, D]`, v `[B, Hk, K, Dv]`, mask `[B, 1, Q, K]` (or of each head) to
    `[B, H, Q, Dv]`.

    causal: the rows are whole sequences, padded behind their end alone, of which a query sees all up to itself. So the
    mask is not needed: what a padded query sees, and who sees a padded key, matters to nobody.
    """
    groups = q.shape[1] // k.shape[1]
    if causal and v.shape[-1] == q.shape[-1]:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=groups > 1)
    if groups > 1:
        k, v = (t.repeat_interleave(groups, 1) for t in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
