"""Drawing tokens from logits, with the exact log-probability of the draw.

One uniform number a token and inverse-transform sampling: what a row draws depends on its own numbers alone, not on
which rows happen to be in the batch, and costs no random number per vocabulary entry.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.trajectory import Sampling

BLOCK = 256  # the cumulative sum is taken over blocks of the vocabulary, then inside the chosen block


class Draw(NamedTuple):
    """token `[rows]` int64; logp: fp32 log-probability under the truncated distribution it was drawn from;
    logp_full: under the full vocabulary at the sampling temperature (at temperature 1 when greedy).
    """

    token: Tensor
    logp: Tensor
    logp_full: Tensor


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Draw:
    """Draw a token a row: logits `[rows, vocab]` fp32, uniform `[rows]` in [0, 1)."""
    if sampling.temperature == 0:
        token = logits.argmax(-1)
        chosen = logits.gather(1, token[:, None])[:, 0]
        return Draw(token, torch.zeros_like(chosen), chosen - torch.logsumexp(logits, -1))
    scaled = logits / sampling.temperature if sampling.temperature != 1 else logits
    normaliser = torch.logsumexp(scaled, -1)
    if not sampling.truncated:
        token = _invert((scaled - normaliser[:, None]).exp_(), uniform)
        logp = scaled.gather(1, token[:, None])[:, 0] - normaliser
        return Draw(token, logp, logp)
    kept, index = _truncate(scaled, sampling)
    kept_normaliser = torch.logsumexp(kept, -1)
    place = _invert((kept - kept_normaliser[:, None]).exp_(), uniform)[:, None]
    chosen = kept.gather(1, place)[:, 0]
    return Draw(index.gather(1, place)[:, 0], chosen - kept_normaliser, chosen - normaliser)


def _truncate(scaled: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Kept logits in descending order, dropped ones at -inf, and their token ids: `[rows, kept]` each."""
    vocab = scaled.shape[-1]
    if sampling.top_k and sampling.top_k < vocab:
        kept, index = scaled.topk(sampling.top_k, dim=-1)
    else:
        kept, index = scaled.sort(dim=-1, descending=True)
    if sampling.top_p < 1:
        probability = kept.softmax(-1)
        before = probability.cumsum(-1) - probability
        drop = before >= sampling.top_p
        drop[:, 0] = False
        kept = kept.masked_fill(drop, float("-inf"))
    if sampling.min_p > 0:
        threshold = kept[:, :1] + torch.log(torch.tensor(sampling.min_p, dtype=kept.dtype, device=kept.device))
        kept = kept.masked_fill(kept < threshold, float("-inf"))
    return kept, index


def _invert(probability: Tensor, uniform: Tensor) -> Tensor:
    """First index whose cumulative probability exceeds `uniform` of the total; never one of probability zero."""
    rows, vocab = probability.shape
    padded = torch.nn.functional.pad(probability, (0, -vocab % BLOCK)).view(rows, -1, BLOCK)
    blocks = padded.sum(-1, dtype=torch.float64).cumsum(-1)
    goal = uniform.to(torch.float64) * blocks[:, -1]
    block = torch.searchsorted(blocks, goal[:, None], right=True).clamp_(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, blocks.gather(1, (block - 1).clamp_(min=0)), 0)
    inside = padded[torch.arange(rows, device=block.device), block[:, 0]].to(torch.float64).cumsum(-1)
    # rounding may leave the goal at or past the block's end: the last entry that has any probability stands for it
    last = (inside < inside[:, -1:]).sum(-1, keepdim=True)
    place = torch.searchsorted(inside, goal[:, None] - before, right=True)
    return (block * BLOCK + torch.minimum(place, last))[:, 0]
