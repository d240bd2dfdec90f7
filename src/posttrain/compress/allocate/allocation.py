"""Which layer gets how many bits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from posttrain.compress.calls import Batch
from posttrain.compress.stacks import Stack


@dataclass(frozen=True)
class Allocation(ABC):
    """Decides on bits before the walk, from the float model and the calibration batches."""

    @abstractmethod
    def bits(
        self, model: nn.Module, stacks: Sequence[Stack], batches: Sequence[Batch], skip: Sequence[str]
    ) -> dict[str, float]:
        """Bits of linear layers by their whole name in the model; a layer that is not there has its grid's."""
