"""Learned equivalent scales: channels of a norm's output are divided by numbers trained with the weights' ranges."""

from __future__ import annotations

from dataclasses import dataclass

from posttrain.compress.fold import NormSite, change, parameters
from posttrain.compress.solvers.learned import ChannelScale
from posttrain.compress.solvers.reconstruct import Known, Opened, Reconstruction
from posttrain.compress.structure import foldable, norm_outputs
from posttrain.compress.transforms.smooth import smoothing
from posttrain.compress.walk import Block


@dataclass(frozen=True)
class WithScales(Reconstruction):
    """OmniQuant's learned equivalent transformation (LET), of the norms' outputs.

    The layers that read a norm get its output divided by s, and round W diag(s); in the end 1/s goes into the norm's
    gain. s starts as SmoothQuant's with α = 0.5.

    scales: whether to learn them. scale_rate: learning rate of log s.
    """

    scales: bool = False
    scale_rate: float = 0.005

    def open(self, block: Block, known: Known) -> Opened:
        if not self.scales:
            return super().open(block, known)
        sites = foldable(block, type(self).__name__).norms
        moments = norm_outputs(block, [site.norm for site in sites])
        opened = super().open(block, known)
        for site in sites:
            read = [name for name in site.linears if name in opened.layers]
            if not read:
                continue
            weights = [block.linears[name].weight.detach().float() for name in read]
            made = ChannelScale(smoothing(moments[site.norm].absmax, weights, 0.5), self.scale_rate)
            for name in read:
                opened.layers[name].columns = made
                opened.layers[name].soft.scale_columns(made, owns=name == read[0])
            opened.folds.append(_Fold(block, site, made))
        return opened


@dataclass(frozen=True)
class _Fold:
    """Puts a learned scale into the norm, and into what else reads it."""

    block: Block
    site: NormSite
    scale: ChannelScale

    def __call__(self) -> None:
        weights = {f"{name}.weight": layer.weight.detach() for name, layer in self.block.linears.items()}
        changed = self.site.scaled({**parameters(self.block.module), **weights}, self.scale().detach())
        change(self.block.module, {name: value for name, value in changed.items() if name not in weights})
