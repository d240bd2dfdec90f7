"""AWQ: channels that carry large activations get finer weights, by a scale that is searched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor

from posttrain.compress.fold import change, parameters
from posttrain.compress.grids.grid import Grid
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.solvers.rtn import with_bits
from posttrain.compress.structure import foldable, norm_outputs
from posttrain.compress.transforms.search import Part, best, leading, rounded
from posttrain.compress.transforms.transform import Transform
from posttrain.compress.walk import Block

SMALLEST = 1e-4


@dataclass(frozen=True)
class AWQ(Transform):
    r"""Inputs are divided by :math:`s_j = \bar x_j^\rho / \sqrt{\max s \min s}`, with the ρ that loses least.

    x̄ is the mean size of a channel. For ρ = 0, 1/points, ..., below 1, the layers that share an input are rounded with
    their columns times s, and what the module around them gives (all of attention for queries, keys and values, the
    whole of the gated part for gate and up) is compared with what it gave. 1/s goes into the norm before them, or into
    the rows of the layer that feeds them one to one (values into outputs, except where heads share values; up into
    down; a first layer into a second through a ReLU).

    grid: the weights are rounded on it in the search. points: of ρ. tokens: of the calibration that the search runs on,
    in whole batches (means are over all of it).

    Reference: AWQ, 2023, arXiv 2306.00978 (card 000, section 3).
    """

    grid: Grid = field(default_factory=Uniform)
    points: int = 20
    tokens: int = 8192

    def apply_to_block(self, block: Block) -> None:
        found = foldable(block, "AWQ")
        normed = norm_outputs(block, [site.norm for site in found.norms])
        fed = [pair for pair in found.pairs if pair.one_to_one and pair.second in block.linears]
        inner = block.moments([pair.second for pair in fed], gram=False)
        for site in found.norms:
            names = [name for name in site.linears if name in block.linears]
            if names:
                scale = self._search(block, names, normed[site.norm].mean_abs)
                change(block.module, site.scaled(parameters(block.module), scale))
        for pair in fed:
            scale = self._search(block, [pair.second], inner[pair.second].mean_abs)
            change(block.module, pair.scaled(parameters(block.module), scale))

    def _search(self, block: Block, names: Sequence[str], mean: Tensor) -> Tensor:
        """`[in]` the best scale for the layers of those names."""
        part = Part(block, names, leading(block.inputs, self.tokens))
        weights = {name: block.linears[name].weight.detach().float() for name in names}
        grids = {name: with_bits(self.grid, block.bits.get(name)) for name in names}

        def loss(scale: Tensor, least: float) -> float:
            tried = {
                f"{name}.weight": rounded(weight * scale, grids[name], f"{block.name}.{name}") / scale
                for name, weight in weights.items()
            }
            return part.error(tried, least=least)

        return best([importance(mean, i / self.points) for i in range(self.points)], loss)


def importance(mean: Tensor, power: float) -> Tensor:
    """`[in]` s of a ρ, from the mean sizes of the channels."""
    scale = (mean**power).clamp(min=SMALLEST)
    return scale / (scale.max() * scale.min()).sqrt()
