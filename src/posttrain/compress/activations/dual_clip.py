"""Dual clipping: the two ends of each channel's range learned apart, so that the layers behind lose least."""

from __future__ import annotations

from collections.abc import Callable, Sequence

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
    mean, product = x.mean(0), _cost(weights)
    least = float(quadratic(rounded(x, *affine(low, high, bits), bits) - x, product))

    def ends(below: Tensor, above: Tensor) -> tuple[Tensor, Tensor]:
        return mean - below * (mean - low), mean + above * (high - mean)

    def loss(start: Tensor, end: Tensor) -> Tensor:
        return quadratic(soft_rounded(x, start, end, bits) - x, product)

    found = _descended((low, high), least, ends, loss, steps, rate)
    return found[0], found[1]


def learned_extent(
    x: Tensor, weights: Sequence[Tensor], extent: Tensor, bits: int, steps: int = 200, rate: float = 0.05
) -> Tensor:
    r"""`[in]` the largest size σ(φ) e of every channel's range around 0, e the whole one: see `learned_ends`."""
    product, middle = _cost(weights), 2 ** (bits - 1)
    zero = torch.full((len(extent), 1), float(middle))
    whole = torch.where(extent > 0, extent, torch.ones_like(extent))

    def loss(most: Tensor) -> Tensor:
        scale = (most / (middle - 1))[:, None]
        return quadratic(fake_quantized(x.T, scale, zero, 2 * middle - 1).T - x, product)

    (found,) = _descended((whole,), float(loss(whole)), lambda share: (share * whole,), loss, steps, rate)
    return torch.where(extent > 0, found, extent)


def _cost(weights: Sequence[Tensor]) -> Tensor:
    """`[in, in]` what an error of an input costs in the outputs of the layers behind."""
    return torch.stack([w.T @ w for w in weights]).sum(0)


def _descended(
    whole: tuple[Tensor, ...], least: float, ends: Callable[..., tuple[Tensor, ...]], loss: Callable[..., Tensor],
    steps: int, rate: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The ends of least loss that Adam meets, the whole range, of loss `least`, among them.

    ends: of the shares σ of each part of the range, of which there are as many as ends.
    """
    best = whole
    with torch.enable_grad():
        logits = [nn.Parameter(torch.full_like(end, START)) for end in whole]
        optimizer = torch.optim.Adam(logits, lr=rate)
        for _ in range(steps):
            now = ends(*(torch.sigmoid(each) for each in logits))
            lost = loss(*now)
            if (value := float(lost.detach())) < least:
                best, least = tuple(end.detach() for end in now), value
            optimizer.zero_grad(set_to_none=True)
            lost.backward()
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
