"""How the inputs of packed layers are quantized: fitted to a layer's statistics, a step that rounds what it gets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.inputs import InputStep

if TYPE_CHECKING:
    from posttrain.compress.walk import Block


@dataclass(frozen=True)
class Activations(ABC):
    """bits: of an activation."""

    bits: int = 8

    @property
    def uses_data(self) -> bool:
        """Whether `fit` looks at the statistics (static ranges) or not (dynamic ones)."""
        return False

    @property
    def keep(self) -> int:
        """Token vectors that `fit` wants kept in the statistics."""
        return 512

    @abstractmethod
    def fit(self, moments: InputMoments | None, width: int, name: str) -> InputStep:
        """A step that rounds `[..., width]` inputs. moments: of them; None where the part uses no data."""

    def fit_layer(self, moments: InputMoments | None, layer: nn.Linear, name: str) -> InputStep:
        """The same for a layer; a part that asks what a transform has put before the layer overrides this."""
        return self.fit(moments, layer.in_features, name)

    def fit_block(self, block: Block) -> None:
        """Give each layer of a block the step that will round its inputs once it is packed.

        A step that a transform has given a layer stays (None: its inputs are not rounded). A part that rounds something
        else inside a block too overrides this.
        """
        names = [name for name in block.linears if name not in block.quantizers]
        moments = block.moments(names, gram=False, keep=self.keep) if self.uses_data and names else {}
        for name in names:
            layer = block.linears[name]
            block.quantizers[name] = self.fit_layer(moments.get(name), layer, f"{block.name}.{name}")
