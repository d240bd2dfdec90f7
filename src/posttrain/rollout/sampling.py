"""Drawing tokens from logits, with the exact log-probability of the draw.

One uniform number a token and inverse-transform sampling: what a row draws depends on its own numbers alone, not on
which rows happen to be in the batch, and costs no random number per vocabulary entry.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.native import library, softmax
from posttrain.objective.logprob import Head
from posttrain.trajectory import PosttrainError, Sampling

BLOCK = 256  # the cumulative sum is taken over blocks of the vocabulary, then inside the chosen block
CANDIDATES = (64, 512, 4096)  # how many of the likeliest tokens are looked at before the whole vocabulary is sorted
NOT_FINITE = (
    "the model's logits are not finite numbers, so no token can be drawn: its weights have diverged or overflow in "
    "this precision; lower the learning rate, or load the model in fp32"
)


class Draw(NamedTuple):
    """token `[rows]` int64; logp: fp32 log-probability under the truncated distribution it was drawn from;
    logp_full: under the full vocabulary at the sampling temperature (at temperature 1 when greedy).
    """

    token: Tensor
    logp: Tensor
    logp_full: Tensor


def draw_next(head: Head, hidden: Tensor, uniform: Tensor, sampling: Sampling) -> Draw:
    """As `draw`, from the hidden states `[rows, width]` and the vocabulary projection: where nothing is cut off, the
    logits are gone through in place, without a copy in fp32.
    """
    factor = head.factor
    plain = sampling.temperature > 0 and not sampling.truncated
    if not plain or factor is None or not library.there_for(hidden, head.weight):
        return draw(head.logits(hidden), uniform, sampling)
    token, logp = softmax.draw(head.product(hidden), uniform, factor / sampling.temperature)
    if bool((token < 0).any()):
        raise PosttrainError(NOT_FINITE)
    return Draw(token, logp, logp)


def draw(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Draw:
    """Draw a token a row: logits `[rows, vocab]` fp32 (-inf forbids a token), uniform `[rows]` fp64 in [0, 1).

    Raises PosttrainError where a row has a NaN, an infinite logit, or no token that is allowed.
    """
    scaled = _scaled(logits, sampling.temperature)
    normaliser = torch.logsumexp(scaled, -1)
    if not bool(torch.isfinite(normaliser).all()):
        raise PosttrainError(NOT_FINITE)
    if sampling.temperature == 0 or not sampling.truncated:
        return _plain(scaled, normaliser, uniform, sampling)
    kept, index = _truncate(scaled, normaliser, sampling)
    kept_normaliser = torch.logsumexp(kept, -1)
    place = _invert((kept - kept_normaliser[:, None]).exp_(), uniform)[:, None]
    chosen = kept.gather(1, place)[:, 0]
    return Draw(index.gather(1, place)[:, 0], chosen - kept_normaliser, chosen - normaliser)


def draw_plain(logits: Tensor, uniform: Tensor, sampling: Sampling) -> Draw:
    """As `draw`, for sampling that is not truncated, without a word from the device to the host: where a row has no
    finite logits, its `logp_full` is no finite number.
    """
    scaled = _scaled(logits, sampling.temperature)
    return _plain(scaled, torch.logsumexp(scaled, -1), uniform, sampling)


def _plain(scaled: Tensor, normaliser: Tensor, uniform: Tensor, sampling: Sampling) -> Draw:
    if sampling.temperature == 0:
        token = scaled.argmax(-1)
        chosen = scaled.gather(1, token[:, None])[:, 0]
        return Draw(token, torch.zeros_like(chosen), chosen - normaliser)
    token = _invert((scaled - normaliser[:, None]).exp_(), uniform)
    logp = scaled.gather(1, token[:, None])[:, 0] - normaliser
    return Draw(token, logp, logp)


def probabilities(logits: Tensor, sampling: Sampling) -> Tensor:
    """`[rows, vocab]`: the distribution that `draw` draws from; at temperature 0, all of it on the likeliest token."""
    if sampling.temperature == 0:
        return torch.zeros_like(logits).scatter_(-1, logits.argmax(-1, keepdim=True), 1.0)
    scaled = _scaled(logits, sampling.temperature)
    if not sampling.truncated:
        return scaled.softmax(-1)
    kept, index = _truncate(scaled, torch.logsumexp(scaled, -1), sampling)
    return torch.zeros_like(logits).scatter_(-1, index, kept.softmax(-1))


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    if temperature in (0, 1):
        return logits
    # relative to the largest, so that a small temperature cannot overflow
    return (logits - logits.amax(-1, keepdim=True)).div_(temperature)


def _truncate(scaled: Tensor, normaliser: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Logits of the likeliest tokens, dropped ones at -inf, and their ids, ascending: `[rows, candidates]` each.

    Every truncation keeps what is at least some logit, so tokens of equal logit stay or go together (as in the top-k of
    `transformers`) and the kept set depends on the row alone.
    """
    vocab = scaled.shape[-1]
    for size in (*(c for c in CANDIDATES if sampling.top_k < c < vocab), vocab):
        values, index = scaled.topk(size, dim=-1)
        threshold = _threshold(values, normaliser, sampling)
        last = values[:, -1:]
        if size == vocab or bool(((last < threshold) | (last == float("-inf"))).all()):
            break
    index, order = index.sort(-1)
    return values.masked_fill(values < threshold, float("-inf")).gather(1, order), index


def _threshold(values: Tensor, normaliser: Tensor, sampling: Sampling) -> Tensor:
    """`[rows, 1]` smallest kept logit; values: `[rows, candidates]` in descending order.

    Right where it exceeds the last candidate, as then every kept token is among the candidates.
    """
    threshold = torch.full_like(values[:, :1], float("-inf"))
    total = normaliser[:, None]
    if 0 < sampling.top_k < values.shape[1]:
        threshold = values[:, sampling.top_k - 1, None]
        total = torch.logsumexp(values.masked_fill(values < threshold, float("-inf")), -1, keepdim=True)
    if sampling.top_p < 1:
        probability = (values - total).to(torch.float64).exp_().masked_fill_(values < threshold, 0)
        before = probability.cumsum(-1) - probability
        count = (before < sampling.top_p).sum(-1, keepdim=True).clamp_(min=1)
        threshold = torch.maximum(threshold, values.gather(1, count - 1))
    if sampling.min_p > 0:
        threshold = torch.maximum(threshold, values[:, :1] + math.log(sampling.min_p))
    return threshold


def _invert(probability: Tensor, uniform: Tensor) -> Tensor:
    """First index whose cumulative probability exceeds `uniform` of the total; never one of probability zero."""
    rows, vocab = probability.shape
    padded = torch.nn.functional.pad(probability, (0, -vocab % BLOCK)).view(rows, -1, BLOCK)
    blocks = padded.sum(-1).to(torch.float64).cumsum(-1)
    goal = uniform.to(torch.float64) * blocks[:, -1]
    block = torch.searchsorted(blocks, goal[:, None], right=True).clamp_(max=blocks.shape[1] - 1)
    before = torch.where(block > 0, blocks.gather(1, (block - 1).clamp_(min=0)), 0)
    inside = padded[torch.arange(rows, device=block.device), block[:, 0]].to(torch.float64).cumsum(-1)
    # rounding may leave the goal at or past the block's end: the last entry that has any probability stands for it
    last = (inside < inside[:, -1:]).sum(-1, keepdim=True)
    place = torch.searchsorted(inside, goal[:, None] - before, right=True)
    return (block * BLOCK + torch.minimum(place, last))[:, 0]
