"""Bits for layers at a given mean, so that the sum of what they lose is least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from posttrain.trajectory import PosttrainError


@dataclass(frozen=True)
class Priced:
    """A layer, or several that get the same bits. weights: how many. losses: by bits, what it loses with them."""

    weights: int
    losses: Mapping[int, float]


def within_budget(layers: Sequence[Priced], bits: float) -> list[int]:
    r"""Bits that minimise `Σ loss_l(b_l)` subject to `Σ n_l b_l <= bits Σ n_l`, which is met to within one layer.

    Of each layer the options on the lower convex hull of (size, loss) count; its steps, the largest gain a bit first,
    are taken as far as the budget reaches. That is the Lagrangian solution, and what it leaves is filled in the same
    order. Raises PosttrainError where even the fewest bits are more than the budget.
    """
    left = bits * sum(layer.weights for layer in layers)
    found = [min(layer.losses) for layer in layers]
    left -= sum(n.weights * b for n, b in zip(layers, found, strict=True))
    if left < -1e-6:
        raise PosttrainError(f"a mean of {bits:g} bits is less than the fewest that a layer may have, {max(found)}")
    steps = []
    for number, layer in enumerate(layers):
        hull = _hull(layer.losses)
        for low, high in pairwise(hull):
            gain = (layer.losses[low] - layer.losses[high]) / (layer.weights * (high - low))
            if gain > 0:
                steps.append((-gain, high, number, low))
    for _, high, number, low in sorted(steps):
        cost = layers[number].weights * (high - low)
        if found[number] == low and cost <= left + 1e-6:
            found[number] = high
            left -= cost
    return found


def _hull(losses: Mapping[int, float]) -> list[int]:
    """The bits whose losses lie on the lower convex hull, ascending."""
    hull: list[int] = []
    for bits in sorted(losses):
        while len(hull) >= 2:
            a, b = hull[-2:]
            if (losses[a] - losses[b]) * (bits - b) > (losses[b] - losses[bits]) * (b - a):
                break
            hull.pop()
        hull.append(bits)
    return hull


def in_tiers(sensitivity: Sequence[float], bits: Sequence[int]) -> list[int]:
    """The most sensitive part gets the first of `bits`, the next part the second, ...: parts of equal size."""
    order = sorted(range(len(sensitivity)), key=lambda i: -sensitivity[i])
    found = [0] * len(order)
    for place, number in enumerate(order):
        found[number] = bits[place * len(bits) // len(order)]
    return found
