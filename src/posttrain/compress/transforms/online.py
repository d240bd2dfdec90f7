"""Hadamard products inside a block: folded into the weights where that is possible, else when the model runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from posttrain.compress.fold import Pair, Parameters, change, parameters
from posttrain.compress.packed.linear import TransformedLinear
from posttrain.compress.stacks import replace_module
from posttrain.compress.structure import Bench
from posttrain.compress.transforms import hadamard
from posttrain.compress.transforms.transform import Transform
from posttrain.compress.walk import Block
from posttrain.trajectory import PosttrainError


@dataclass(frozen=True)
class OnlineHadamard(Transform):
    """The inputs of layers that write the residual stream are multiplied by a Hadamard matrix.

    Behind attention the part within a head is folded into values and outputs, and only channels of different heads are
    mixed when the model runs (not at all where their number, such as 9, has no Hadamard matrix). The inputs of other
    such layers (down_proj) are multiplied when the model runs, and the weights by the transposed matrix before.

    heads: whether to do so behind attention at all.

    Reference: QuaRot, 2024, arXiv 2404.00456 (card 000, section 8).
    """

    heads: bool = True

    @torch.no_grad()
    def apply_to_block(self, block: Block) -> None:
        bench = Bench(block)
        found = bench.structure()
        width = bench.output.shape[-1]
        values = {pair.second: pair for pair in found.pairs if pair.attention}
        readers = {name for site in found.norms for name in site.linears}
        for name, linear in block.linears.items():
            if linear.out_features != width or name in readers or name in found.queries_keys:
                continue
            if name in values:
                if self.heads:
                    _behind_attention(block, bench, values[name], linear)
            else:
                _before(block, name, linear, hadamard.HadamardStep(linear.in_features))
                weight = block.module.get_parameter(f"{name}.weight")
                weight.copy_(hadamard.multiplied(weight.double()))


def _behind_attention(block: Block, bench: Bench, pair: Pair, linear: nn.Linear) -> None:
    width = bench.head_width
    if width is None or not hadamard.exists(width):
        raise PosttrainError(
            f"{block.name}.{pair.second}: heads of {width} channels have no Hadamard matrix that is known here; turn "
            f"the option heads off"
        )
    if not bench.unchanged(_by_heads(pair, width, bench.now)):
        raise PosttrainError(
            f"{block.name}.{pair.second}: its inputs do not lie head by head; turn the option heads off"
        )
    change(block.module, _by_heads(pair, width, parameters(block.module)))
    heads = linear.in_features // width
    if heads > 1 and hadamard.exists(heads):
        _before(block, pair.second, linear, hadamard.HadamardStep(linear.in_features, heads))
        weight = block.module.get_parameter(f"{pair.second}.weight")
        weight.copy_(hadamard.across(weight.double(), heads))


def _by_heads(pair: Pair, width: int, now: Parameters) -> dict[str, Tensor]:
    """Parameters with which the values of each head are multiplied by a Hadamard matrix, and read so."""
    changed = {}
    for name in (f"{pair.first}.weight", f"{pair.first}.bias"):
        if (value := now.get(name)) is not None:
            value = value.float().clone()
            heads = value[pair.rows].double().unflatten(0, (-1, width)).movedim(1, -1)
            value[pair.rows] = hadamard.multiplied(heads).movedim(-1, 1).flatten(0, 1).float()
            changed[name] = value
    columns = now[f"{pair.second}.weight"].double().unflatten(1, (-1, width))
    changed[f"{pair.second}.weight"] = hadamard.multiplied(columns).flatten(1).float()
    return changed


def _before(block: Block, name: str, linear: nn.Linear, step: hadamard.HadamardStep) -> None:
    replace_module(block.module, name, TransformedLinear.of(linear, nn.Sequential(step)))
