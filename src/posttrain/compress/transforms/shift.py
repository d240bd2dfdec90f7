"""Outlier Suppression+: channels shifted to their middle, and those that stick out scaled down to a threshold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from posttrain.compress.activations.dynamic import Per, asymmetric, check_bits, symmetric
from posttrain.compress.fold import NormSite, change, parameters
from posttrain.compress.grids.grid import Grid
from posttrain.compress.grids.restricted import Restricted
from posttrain.compress.solvers.rtn import with_bits
from posttrain.compress.structure import Structure, foldable, norm_outputs
from posttrain.compress.transforms.search import Part, best, leading, rounded
from posttrain.compress.transforms.transform import Transform
from posttrain.compress.walk import Block
from posttrain.trajectory import PosttrainError

STEPS, STRIDE = 100, 0.5  # thresholds that are tried: at least so many, at most so far apart


@dataclass(frozen=True)
class OutlierSuppression(Transform):
    r"""Inputs X become :math:`(X - z) / s`, with

    .. math:: z_j = \tfrac12 (\max X_j + \min X_j), \qquad s_j = \max(1, \max|X_j - z_j| / t).

    The shift z goes into the norm's bias and the biases of the layers that read it (where one has none it gets one);
    the scale as SmoothQuant's. Of the thresholds t from the largest input down to `lower`, the one is taken with which
    the part that the layers feed (attention without its output layer, the gated product, else the layers themselves)
    changes least when inputs and weights are rounded. Inputs of a layer that another feeds channel by channel without
    attention between (up into down) are scaled as well.

    grid: of the weights. bits, symmetric, per: of the inputs. Per `tensor` has the range [-t, t].
    shift: None where the norm has a bias and all its readers are linear layers; True insists, False never.
    scale: whether to search t at all. lower: smallest t that is tried (1.0 in the paper for OPT and BERT).
    tokens: of the calibration that the search looks at, in whole batches (one batch in the paper). Ranges, which z, s
    and the largest t follow from, are of all of it, as those of `Static` behind it are.

    Reference: Outlier Suppression+, 2023, arXiv 2304.09145 (card 145).
    """

    grid: Grid = field(default_factory=Restricted)
    bits: int = 8
    symmetric: bool = True
    per: Per = "tensor"
    shift: bool | None = None
    scale: bool = True
    lower: float = 0.1
    tokens: int = 4096

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if self.lower <= 0:
            raise PosttrainError(f"lower is {self.lower}; expected a threshold above 0")

    def apply_to_block(self, block: Block) -> None:
        found = foldable(block, "Outlier Suppression+")
        for site in found.norms:
            names = [name for name in site.linears if name in block.linears]
            if names:
                self._norm(block, found, site, names)
        if self.scale:
            calls = leading(block.inputs, self.tokens)
            for pair in found.pairs:
                if not pair.attention and pair.one_to_one and pair.second in block.linears:
                    met = block.moments([pair.second], gram=False)[pair.second]
                    part = Part(block, [pair.second], calls)
                    scale = self._search(block, part, [pair.second], met.minimum, met.maximum, None)
                    change(block.module, pair.scaled(parameters(block.module), scale))

    def _norm(self, block: Block, found: Structure, site: NormSite, names: Sequence[str]) -> None:
        calls = leading(block.inputs, self.tokens)
        met = norm_outputs(block, [site.norm])[site.norm]
        shift = centre(met.minimum, met.maximum) if self._shifts(block, site) else None
        away = shift if shift is not None else torch.zeros_like(met.minimum)
        scale = torch.ones_like(met.minimum)
        if self.scale:
            until = next((pair.second for pair in found.pairs if pair.first in names), None)
            part = Part(block, names, calls, until=until)
            scale = self._search(block, part, names, met.minimum - away, met.maximum - away, shift)
        change(block.module, site.scaled(parameters(block.module), scale, shift))

    def _shifts(self, block: Block, site: NormSite) -> bool:
        """Whether the norm can take a shift in; PosttrainError where that is insisted on and it cannot."""
        if self.shift is False:
            return False
        able = site.bias and not site.others
        if self.shift and not able:
            why = f"also feeds {site.others[0].parameter}" if site.bias else "has no bias"
            raise PosttrainError(
                f"Outlier Suppression+ cannot shift {block.name}.{site.norm}: it {why}; take shift=None to shift only "
                f"where that is possible"
            )
        return able

    def _search(
        self, block: Block, part: Part, names: Sequence[str], low: Tensor, high: Tensor, shift: Tensor | None
    ) -> Tensor:
        """`[in]` the scale of the best threshold. low, high: `[in]` the range of the shifted inputs."""
        now = parameters(block.module)
        extent = torch.maximum(high, -low)
        weights = {name: now[f"{name}.weight"].float() for name in names}
        grids = {name: with_bits(self.grid, block.bits.get(name)) for name in names}

        def loss(threshold: float, least: float) -> float:
            scale = scaling(extent, threshold)
            changes = {}
            for name, weight in weights.items():
                changes[f"{name}.weight"] = rounded(weight * scale, grids[name], f"{block.name}.{name}")
                if shift is not None:
                    bias = now.get(f"{name}.bias")
                    changes[f"{name}.bias"] = weight @ shift + (0.0 if bias is None else bias.float())
            return part.error(changes, dict.fromkeys(names, self._inputs(threshold, scale, shift)), least=least)

        return scaling(extent, best(thresholds(float(extent.max()), float(high.max()), self.lower), loss))

    def _inputs(self, threshold: float, scale: Tensor, shift: Tensor | None) -> Callable[[Tensor], Tensor]:
        """What the inputs of a layer become: shifted, scaled and rounded."""

        def rounding(x: Tensor) -> Tensor:
            given = (x.float() if shift is None else x.float() - shift) / scale
            if self.per == "tensor":
                most = torch.tensor(threshold)
                found = (
                    symmetric(given, most, self.bits) if self.symmetric else asymmetric(given, -most, most, self.bits)
                )
            elif self.symmetric:
                found = symmetric(given, given.abs().amax(-1, keepdim=True), self.bits)
            else:
                low, high = given.amin(-1, keepdim=True), given.amax(-1, keepdim=True)
                found = asymmetric(given, low, high, self.bits)
            return found.to(x.dtype)

        return rounding


def centre(low: Tensor, high: Tensor) -> Tensor:
    """`[in]` z: the middle of each channel's range."""
    return (low + high) / 2


def scaling(extent: Tensor, threshold: float) -> Tensor:
    """`[in]` s: channels that reach beyond the threshold are scaled down to it, others stay."""
    return (extent / threshold).clamp(min=1.0)


def thresholds(largest: float, highest: float, lower: float) -> list[float]:
    """From the largest input down to `lower`, in equal steps. highest: the largest on the side above 0."""
    if largest <= lower:
        return [largest] if largest > 0 else [lower]
    steps = max(STEPS, int(highest / STRIDE))
    return [largest - i * (largest - lower) / steps for i in range(steps + 1)]
