"""Softmax over keys and over the vocabulary, in place and in one pass over memory."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.native.library import call, threads

BLOCK = 256  # tokens whose probabilities a draw adds up first; as in the source
KEYS = 64  # keys of a block, as in the source


def attention_weights(scores: Tensor, seen: Tensor, scale: float) -> Tensor:
    """Scores `[batch, heads, queries, keys]` become the softmax of `scale * scores` where `seen` `[batch, 1, queries,
    keys]` bool, in place.
    """
    batch, heads, queries, keys = scores.shape
    count = threads(scores.numel())
    scratch = torch.empty(count, -(-keys // KEYS) * KEYS, device=scores.device)
    call(
        "attention_weights", scores.dtype, scores, seen.contiguous().view(torch.uint8), scratch,
        batch, heads, queries, keys, scale, count=count,
    )  # fmt: skip
    return scores


def attention_gradients(scores: Tensor, seen: Tensor, back: Tensor, out: Tensor, given: Tensor, scale: float) -> None:
    """Scores become weights as above, and `back`, the gradient of the weights, that of the scores; both in place.

    out, given: `[batch, heads, queries, width]`, the output of attention and its gradient.
    """
    batch, heads, queries, keys = scores.shape
    count = threads(scores.numel())
    scratch = torch.empty(count, -(-keys // KEYS) * KEYS, device=scores.device)
    call(
        "attention_back", scores.dtype, scores, seen.contiguous().view(torch.uint8), scratch, back,
        out.contiguous(), given.contiguous(), batch, heads, queries, keys, out.shape[-1], scale, count=count,
    )  # fmt: skip


def log_sum(logits: Tensor, scale: float, *, entropy: bool = False) -> tuple[Tensor, Tensor | None]:
    """`[rows, vocab]` to `[rows]` fp32 each: log of the sum of `exp(scale * logits)`, and the softmax's entropy."""
    rows, vocab = logits.shape
    found, spread = torch.empty(rows), torch.empty(rows) if entropy else None
    call("log_sum", logits.dtype, logits, found, spread, rows, vocab, scale, count=threads(logits.numel()))
    return found, spread


def logit_gradient(logits: Tensor, target: Tensor, lse: Tensor, given: Tensor, scale: float) -> Tensor:
    """Logits become the gradient of `sum_i given_i (scale * logits[i, target_i] - lse_i)`, in place.

    logits: `[rows, vocab]`; target: `[rows]` int64; lse, given: `[rows]` fp32.
    """
    rows, vocab = logits.shape
    call(
        "logit_gradient", logits.dtype, logits, target.contiguous(), lse.contiguous(), given.float().contiguous(),
        rows, vocab, scale, count=threads(logits.numel()),
    )  # fmt: skip
    return logits


def draw(logits: Tensor, uniform: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A token a row from the softmax of `scale * logits`, by inverting its cumulative sum at `uniform` `[rows]` fp64.

    Returns `[rows]` int64 (-1 where a row is not finite or allows nothing) and its fp32 log-probability.
    """
    rows, vocab = logits.shape
    count = threads(logits.numel())
    token, logp = (torch.empty(rows, dtype=dtype, device=logits.device) for dtype in (torch.int64, torch.float32))
    sums = torch.empty(count, -(-vocab // BLOCK), dtype=torch.float64, device=logits.device)
    call(
        "draw", logits.dtype, logits, uniform.to(torch.float64).contiguous(), token, logp, sums, rows, vocab, scale,
        count=count,
    )  # fmt: skip
    return token, logp
