"""Weighted k-means, and the nearest row of a table: whole vectors, in bounded memory, by seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from posttrain.compress.kernels.library import there_for
from posttrain.compress.kernels.vectors import nearest_entries

CHUNK = 1 << 16  # distances held at a time: they are to stay in a core's cache


def nearest(vectors: Tensor, table: Tensor) -> Tensor:
    """`[n, v]` and `[k, v]` fp32 -> `[n]` int64: the row of the table nearest to each vector (the first of equals)."""
    if there_for(vectors, table):
        return nearest_entries(vectors, table)
    half = table.square().sum(1) / 2
    rows = max(1, CHUNK // len(table))
    found = [torch.addmm(half, part, table.T, alpha=-1.0).min(1).indices for part in vectors.split(rows)]
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.int64)


def weighted_kmeans(
    vectors: Tensor,
    weights: Tensor,
    count: int,
    *,
    iterations: int = 25,
    tolerance: float = 1e-5,
    sample: int = 200,
    seed: int = 0,
) -> Tensor:
    """`[count, v]` centroids that make the weighted squared distance of `[n, v]` vectors to their nearest one small.

    weights: `[n]`; vectors of weight 0 have no say. iterations: at most; it ends when one gains less than a share of
    `tolerance`. sample: at most so many vectors a centroid are looked at, drawn by seed and by their weights, then
    alike (0: all). Centroids begin at different vectors drawn by seed; one that no vector is nearest to moves to the
    vector that is served worst. Where there are no more different vectors than centroids, they are the centroids.
    """
    table = torch.zeros(count, vectors.shape[1])
    vectors, weights = vectors[weights > 0].float(), weights[weights > 0].float()
    if not len(vectors):
        return table
    draw = torch.Generator().manual_seed(seed)
    whole = vectors
    if sample and len(vectors) > sample * count:
        chosen = drawn_by(weights, sample * count, draw)
        vectors, weights = vectors[chosen], torch.ones(len(chosen))
    distinct = _distinct(vectors, draw)
    if len(distinct) <= count and len(whole) > len(vectors):
        distinct = _distinct(whole, draw)
    if len(distinct) <= count:
        table[: len(distinct)] = distinct
        return table
    table = distinct[torch.randperm(len(distinct), generator=draw)[:count]].clone()
    weights = weights / weights.mean()
    before = math.inf
    for _ in range(iterations):
        index = nearest(vectors, table)
        gaps = (vectors - table[index]).square().sum(1) * weights
        error = float(gaps.double().sum())
        mass = torch.zeros(count).index_add_(0, index, weights)
        sums = torch.zeros_like(table).index_add_(0, index, vectors * weights[:, None])
        empty = mass == 0
        table = torch.where(empty[:, None], table, sums / mass.clamp(min=1e-30)[:, None])
        if empty.any():
            table[empty] = vectors[gaps.topk(int(empty.sum())).indices]
        elif math.isfinite(before) and before - error <= tolerance * before:
            break
        before = error
    return table


def drawn_by(weights: Tensor, count: int, draw: torch.Generator) -> Tensor:
    """`[count]` places, each drawn with a chance in proportion to its `[n]` weights, with replacement.

    At even steps from a random start along the running sum, so that what weighs much is drawn as often as it weighs.
    """
    total = weights.double().cumsum(0)
    at = (torch.arange(count, dtype=torch.float64) + torch.rand(1, generator=draw, dtype=torch.float64)) / count
    return torch.searchsorted(total, at * total[-1]).clamp_(max=len(weights) - 1)


def _distinct(vectors: Tensor, draw: torch.Generator) -> Tensor:
    """The different ones among `[n, v]` vectors, told apart by a random projection."""
    keys = vectors.double() @ torch.randn(vectors.shape[1], generator=draw, dtype=torch.float64)
    _, inverse = torch.unique(keys, return_inverse=True)
    first = torch.full((int(inverse.max()) + 1,), len(vectors)).scatter_reduce_(
        0, inverse, torch.arange(len(vectors)), "amin"
    )
    return vectors[first]
