"""How much a layer's rounding matters to the next one, by the entropy of their inputs; and blocks joined by it."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

SMALL = 1e-5


def entropy(values: Tensor) -> float:
    """`-Σ_i p_i ln p_i` over tokens i, `p_i = |x_i| / Σ|x|`, averaged over channels. values: `[tokens, channels]`.

    0 where a channel has one token that is not 0, ln of the number of tokens where all are of one size.
    """
    return float(torch.special.entr(_shares(values)).sum(0).mean())


def dependency(first: Tensor, second: Tensor) -> float:
    """`-Σ_i p(x_i, y_i) ln p(y_i | x_i)` over tokens i, averaged over channels, of inputs `[tokens, channels]` of two
    layers that follow each other. The joint share is proportional to the product of both, the conditional one to their
    ratio; all sum to 1 over the tokens.
    """
    before, after = _shares(first), _shares(second)
    joint = _shares(before * after)
    conditional = _shares(after / (before + SMALL))
    return float(-(joint * (conditional + SMALL).log()).sum(0).mean())


def _shares(values: Tensor) -> Tensor:
    size = values.abs().double()
    return size / size.sum(0).clamp(min=1e-30)


@dataclass
class Partition:
    """Joins layers to blocks while a model is walked. longest: layers of a block.

    A layer joins the one before it where their dependency (or, where their inputs have different shapes, the entropy of
    its own) is at least the mean of all such values so far, and the block has room.
    """

    longest: int = 3
    entropies: list[float] = field(default_factory=list)
    dependencies: list[float] = field(default_factory=list)

    def joined(self, inputs: list[Tensor]) -> list[list[int]]:
        """Numbers of layers, block by block. inputs: of each layer, `[tokens, channels]`, as rounded."""
        blocks: list[list[int]] = []
        for number, values in enumerate(inputs):
            joins = number > 0 and self._high(inputs[number - 1], values)
            if joins and len(blocks[-1]) < self.longest:
                blocks[-1].append(number)
            else:
                blocks.append([number])
        return blocks

    def high_entropy(self, values: Tensor) -> bool:
        return _noted(self.entropies, entropy(values))

    def _high(self, before: Tensor, values: Tensor) -> bool:
        if before.shape != values.shape:
            return self.high_entropy(values)
        return _noted(self.dependencies, dependency(before, values))


def _noted(values: list[float], value: float) -> bool:
    values.append(value)
    return value >= sum(values) / len(values)
