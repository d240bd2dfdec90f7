"""How the inputs of packed layers are quantized: fitted to a layer's statistics, a step that rounds what it gets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import nn

from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.inputs import InputStep


@dataclass(frozen=True)
class Activations(ABC):
    """bits: of an activation."""

    bits: int = 8

    @property
    def uses_data(self) -> bool:
        """Whether `fit` looks at the statistics (static ranges) or not (dynamic ones)."""
        return False

    @abstractmethod
    def fit(self, moments: InputMoments | None, width: int, name: str) -> InputStep:
        """A step that rounds `[..., width]` inputs. moments: of them; None where the part uses no data."""

    def fit_layer(self, moments: InputMoments | None, layer: nn.Linear, name: str) -> InputStep:
        """The same for a layer; a part that asks what a transform has put before the layer overrides this."""
        return self.fit(moments, layer.in_features, name)
