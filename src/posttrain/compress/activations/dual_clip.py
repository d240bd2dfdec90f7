"""Dual clipping: the two ends of each channel's range learned apart, so that the layers behind lose least."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from posttrain.compress.activations.percentile import Range, affine, rounded
from posttrain.compress.solvers.adaround import quadratic
from posttrain.compress.solvers.learned import fake_quantized, straight_through

START = 4.0  # of the logits: 98 % of the range on either side


def learned_ends(
    x: Tensor, weights: Sequence[Tensor], low: Tensor, high: Tensor, bits: int, steps: int = 200, rate: float = 0.05
) -> Range:
    r"""`[in]` ends `u = m + σ(φ) (high - m)` and `l = m - σ(ψ) (m - low)` of every channel's range, m its mean.

    They minimise Σ ||(x̂ - x) Wᵀ||² over the layers that read x, by Adam, the rounding being passed by straight
    through. The best that were met are taken, the whole range among them. (The paper does not say where the ends are
    measured from; from 0, a range that does not hold it could not be narrowed on one side.)

    x: `[tokens, in]`. weights: `[out, in]` of the layers. low, high: `[in]` the whole range. rate: of φ and ψ.

    Reference: RepQuant, 2024, arXiv 2402.05628 (card 029).
    """
    mean = x.mean(0)
    product = torch.stack([w.T @ w for w in weights]).sum(0)  # what an error of an input costs in outputs
    best = (low, high)
    least = float(quadratic(rounded(x, *affine(low, high, bits), bits) - x, product))
    with torch.enable_grad():
        above, below = (nn.Parameter(torch.full_like(low, START)) for _ in range(2))
        optimizer = torch.optim.Adam([above, below], lr=rate)
        for _ in range(steps):
            ends = mean - torch.sigmoid(below) * (mean - low), mean + torch.sigmoid(above) * (high - mean)
            loss = quadratic(soft_rounded(x, *ends, bits) - x, product)
            if (now := float(loss.detach())) < least:
                best, least = (ends[0].detach(), ends[1].detach()), now
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return best


def learned_extent(
    x: Tensor, weights: Sequence[Tensor], extent: Tensor, bits: int, steps: int = 200, rate: float = 0.05
) -> Tensor:
    r"""`[in]` the largest size σ(φ) e of every channel's range around 0, e the whole one: see `learned_ends`."""
    product = torch.stack([w.T @ w for w in weights]).sum(0)
    middle = 2 ** (bits - 1)
    zero = torch.full((len(extent), 1), float(middle))

    def error(most: Tensor) -> Tensor:
        scale = (most / (middle - 1))[:, None]
        return quadratic(fake_quantized(x.T, scale, zero, 2 * middle - 1).T - x, product)

    most = torch.where(extent > 0, extent, torch.ones_like(extent))
    best, least = extent, float(error(most))
    with torch.enable_grad():
        inner = nn.Parameter(torch.full_like(extent, START))
        optimizer = torch.optim.Adam([inner], lr=rate)
        for _ in range(steps):
            end = torch.sigmoid(inner) * most
            loss = error(end)
            if (now := float(loss.detach())) < least:
                best, least = torch.where(extent > 0, end.detach(), extent), now
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return best


def soft_rounded(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """`[tokens, in]` rounded with whole zero points; what is cut off at an end has its gradient to that end alone.

    A whole zero point moves in jumps: the lower end is taken to lie where it puts it, and its gradient passes through.
    """
    scale, zero = affine(low.detach(), high.detach(), bits)
    steps = straight_through(scale, (high - low) / (2**bits - 1))
    start = straight_through(-zero * scale, low)
    return fake_quantized(x.T, steps[:, None], start[:, None], 2**bits - 1, float_zero=True).T
