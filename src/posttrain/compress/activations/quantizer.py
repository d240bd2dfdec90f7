"""How the inputs of packed layers are quantized: fitted to a layer's statistics, a step that rounds what it gets."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

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
