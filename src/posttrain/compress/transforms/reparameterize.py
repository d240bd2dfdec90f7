"""A range for every channel of a norm's output, turned into one range for all by changing the norm and its readers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from posttrain.compress.activations.dual_clip import learned_ends, learned_extent
from posttrain.compress.activations.dynamic import check_bits
from posttrain.compress.activations.percentile import affine, least_ends
from posttrain.compress.activations.static import StaticStep, symmetric_scale
from posttrain.compress.fold import NormSite, change, parameters
from posttrain.compress.moments import InputMoments
from posttrain.compress.structure import foldable, norm_outputs
from posttrain.compress.transforms.transform import Transform
from posttrain.compress.walk import Block
from posttrain.trajectory import PosttrainError

Centre = Literal["mean", "median"]
Ends = Literal["whole", "percentile", "learned"]
SMALLEST = 1e-3  # of a channel's scale, as a share of the mean one: channels that hardly change


@dataclass(frozen=True)
class Reparameterization(Transform):
    r"""Scales s and zero points z of the channels become one scale s̃ and one zero point z̃, and integers stay the same:

    .. math:: r_1 = s / \tilde s,\quad r_2 = z - \tilde z,\qquad \gamma' = \gamma / r_1,\quad
              \beta' = (\beta + s \odot r_2) / r_1,\quad W' = W \mathrm{diag}(r_1),\quad b' = b - W (s \odot r_2)

    The layers that read the norm then round their inputs with s̃ and z̃. A norm that cannot take a shift (an RMS norm has
    no bias; a router beside the layers) has symmetric ranges, and is scaled alone. Channels whose scale is below a
    thousandth of the mean are given that.

    bits: of the activations. centre: s̃ and z̃ are the `mean` (RepQ-ViT) or the `median` (DopQ-ViT) over channels.
    ends: the channels' ranges: `whole`, by `percentile` (see `Percentile`), or `learned` (dual clipping).
    whole: round z̃ to a whole number, without which integers before and after differ by the rounding threshold.
    folded: False changes nothing and leaves the layers with s and z, a range for every channel: what folding is held
    to, and no integer product can have.
    steps, rate: of the learning. tokens: that ranges are fitted to.

    Reference: RepQ-ViT, 2022, arXiv 2212.08254, and RepQuant, 2024, arXiv 2402.05628 (card 029); DopQ-ViT, 2024, arXiv
    2408.03291 (card 028).
    """

    bits: int = 4
    centre: Centre = "mean"
    ends: Ends = "percentile"
    whole: bool = True
    folded: bool = True
    steps: int = 200
    rate: float = 0.05
    tokens: int = 4096

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.centre not in ("mean", "median"):
            raise PosttrainError(f"centre is {self.centre!r}; expected mean or median")
        if self.ends not in ("whole", "percentile", "learned"):
            raise PosttrainError(f"ends is {self.ends!r}; expected whole, percentile or learned")

    def apply_to_block(self, block: Block) -> None:
        found = foldable(block, "Reparameterization")
        met = norm_outputs(block, [site.norm for site in found.norms], keep=self.tokens)
        for site in found.norms:
            names = [name for name in site.linears if name in block.linears]
            if names:
                self._fold(block, site, names, met[site.norm])

    def _fold(self, block: Block, site: NormSite, names: Sequence[str], met: InputMoments) -> None:
        shifts = site.bias and not site.others
        scale, zero = self.channels(met, [block.linears[n].weight.detach().float() for n in names], shifts)
        one, common = self.common(scale, zero) if self.folded else (scale, zero)
        shift = -scale * (zero - common) if shifts else None
        if self.folded:
            change(block.module, site.scaled(parameters(block.module), scale / one, shift))
        for name in names:
            block.quantizers[name] = StaticStep.of(len(scale), self.bits, one, common if shifts else None)

    def channels(self, met: InputMoments, weights: Sequence[Tensor], shifts: bool) -> tuple[Tensor, Tensor]:
        """`[in]` s and z of what a norm gives; z is 0 where it takes no shift. weights: `[out, in]` of its readers."""
        low, high = met.minimum, met.maximum
        if self.ends == "learned" and not shifts:
            extent = torch.maximum(-low, high).clamp(min=0)
            extent = learned_extent(met.kept, weights, extent, self.bits, self.steps, self.rate)
            return raised(symmetric_scale(extent, self.bits)), torch.zeros_like(low)
        if self.ends == "percentile":
            low, high = least_ends(met.kept.T, self.bits)
        elif self.ends == "learned":
            low, high = learned_ends(met.kept, weights, low, high, self.bits, self.steps, self.rate)
        if not shifts:
            scale = symmetric_scale(torch.maximum(-low, high).clamp(min=0), self.bits)
            return raised(scale), torch.zeros_like(low)
        scale = raised(affine(low, high, self.bits)[0] * (high > low))
        return scale, torch.round(-low / scale)

    def common(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """s̃ and z̃, of the channels that do change: the zero point of one that hardly does may be anything."""
        alive = scale > SMALLEST * scale.mean() * (1 + 1e-6)
        if alive.any():
            scale, zero = scale[alive], zero[alive]
        if self.centre == "median":
            return scale.median(), zero.median()
        return scale.mean(), zero.mean().round() if self.whole else zero.mean()


def raised(scale: Tensor) -> Tensor:
    """Scales of which none is too small; 1 where all are 0."""
    least = SMALLEST * float(scale.mean())
    return scale.clamp(min=least) if least > 0 else torch.ones_like(scale)
