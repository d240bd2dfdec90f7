"""Small images with exact ground truth, made by seed: which pattern the brighter of two squares shows.

Two of the four quarters of an image hold a square with a pattern each, at any place and phase, the one less bright than
the other; all is under noise. To tell the brighter one's pattern a model must find it, and look at several patches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

SIDE = 24  # pixels of an image
SIZES = (8, 9, 10)  # of a square; a quarter has 12
PERIOD = 4  # of a pattern, pixels
DIM, NOISE = 0.7, 0.5  # brightness of the other square; standard deviation of the noise
BORDER = 5  # one description in five is held out
KINDS = ("rows", "columns", "falling", "rising", "checks", "dots", "solid", "frame")
Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Images:
    """pixels: `[n, 1, side, side]` fp32. labels: `[n]` int64, the number in `KINDS` of the brighter pattern."""

    pixels: Tensor
    labels: Tensor


def images(count: int, seed: int = 0, split: Split = "train") -> Images:
    """`count` images drawn by seed. Whether one is held out is a property of what it shows (not of its noise), the same
    for every seed: nothing that `heldout` gives is ever among `train`.
    """
    draw = torch.Generator().manual_seed(2 * seed + (split == "heldout"))
    kept: list[Tensor] = []
    while sum(map(len, kept)) < count:
        drawn = _descriptions(4 * count + 64, draw)
        kept.append(drawn[(_hash(drawn) % BORDER == 0) == (split == "heldout")])
    shown = torch.cat(kept)[:count]
    pixels = _squares(shown[:, 0], shown[:, 2], shown[:, 4:8]) + DIM * _squares(
        shown[:, 1], shown[:, 3], shown[:, 8:12]
    )
    pixels = pixels + NOISE * torch.randn(pixels.shape, generator=draw)
    return Images(pixels[:, None], shown[:, 0])


def _descriptions(count: int, draw: torch.Generator) -> Tensor:
    """`[count, 12]` int64: patterns of the brighter and the other square, their quarters, and of each square its size,
    offset to the right and down, and phase.
    """

    def numbers(below: int) -> Tensor:
        return torch.randint(0, below, (count,), generator=draw)

    kind, quarter = numbers(len(KINDS)), numbers(4)
    other = (kind + 1 + numbers(len(KINDS) - 1)) % len(KINDS)
    elsewhere = (quarter + 1 + numbers(3)) % 4
    squares = []
    for _ in range(2):
        size = torch.tensor(SIZES)[numbers(len(SIZES))]
        room = SIDE // 2 - size + 1
        squares += [size, numbers(1 << 16) % room, numbers(1 << 16) % room, numbers(PERIOD)]
    return torch.stack([kind, other, quarter, elsewhere, *squares], 1)


def _hash(descriptions: Tensor) -> Tensor:
    """`[n]` numbers from 0 on that depend on everything in a description."""
    found = torch.zeros(len(descriptions), dtype=torch.int64)
    for column in descriptions.T:
        found = (found * 31 + column + 7) % 1_000_003
        found = (found * found + found) % 1_000_003
    return found


def _squares(kind: Tensor, quarter: Tensor, shape: Tensor) -> Tensor:
    """`[n, side, side]` brightness from 0 to 1. shape: `[n, 4]` size, offsets and phase."""
    size, right, down, phase = (shape[:, i, None, None] for i in range(4))
    x = torch.arange(SIDE)[None, None] - right - (quarter % 2 * SIDE // 2)[:, None, None]
    y = torch.arange(SIDE)[None, :, None] - down - (quarter // 2 * SIDE // 2)[:, None, None]
    half = PERIOD // 2

    def stripes(along: Tensor) -> Tensor:
        return (along + phase).remainder(PERIOD) < half

    edge = (x < half) | (y < half) | (x >= size - half) | (y >= size - half)
    patterns = {
        "rows": stripes(y),
        "columns": stripes(x),
        "falling": stripes(x - y),
        "rising": stripes(x + y),
        "checks": stripes(x) == stripes(y),
        "dots": stripes(x) & stripes(y),
        "solid": torch.ones_like(x + y, dtype=torch.bool),
        "frame": edge.expand(len(kind), SIDE, SIDE),
    }
    held = torch.stack([patterns[name].expand(len(kind), SIDE, SIDE) for name in KINDS], 1)
    inside = (x >= 0) & (y >= 0) & (x < size) & (y < size)
    return (held[torch.arange(len(kind)), kind] & inside).float()
