"""SmoothQuant: the unevenness of activations moved into the weights, by half."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.compress.fold import change, parameters
from posttrain.compress.structure import foldable, norm_outputs
from posttrain.compress.transforms.transform import Transform
from posttrain.compress.walk import Block
from posttrain.trajectory import PosttrainError

SMALLEST = 1e-5


@dataclass(frozen=True)
class SmoothQuant(Transform):
    r"""Channels of a norm's output are divided by :math:`s_j = \max|X_j|^\alpha / \max_i|W_{ij}|^{1-\alpha}`.

    The maximum of the weights is over all layers that read the norm and are compressed. The scale goes into the norm's
    gain and the layers' columns. alpha: 0.5 shares the difficulty evenly; more moves more of it into the weights.

    Reference: SmoothQuant, 2022, arXiv 2211.10438 (card 000, section 4).
    """

    alpha: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise PosttrainError(f"alpha is {self.alpha}; expected 0 (weights even) to 1 (activations even)")

    def apply_to_block(self, block: Block) -> None:
        found = foldable(block, "SmoothQuant")
        moments = norm_outputs(block, [site.norm for site in found.norms])
        for site in found.norms:
            read = [block.linears[name].weight for name in site.linears if name in block.linears]
            if read:
                scale = smoothing(moments[site.norm].absmax, [w.detach().float() for w in read], self.alpha)
                change(block.module, site.scaled(parameters(block.module), scale))


def smoothing(absmax: Tensor, weights: list[Tensor], alpha: float) -> Tensor:
    """`[in]` s, from the largest inputs `[in]` and the weights `[out, in]` that meet them."""
    largest = torch.stack([w.abs().amax(0) for w in weights]).amax(0).clamp(min=SMALLEST)
    return (absmax.to(largest) ** alpha / largest ** (1 - alpha)).clamp(min=SMALLEST)
