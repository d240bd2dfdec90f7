"""What a compression does to attention: a part that changes how a model's attention modules attend."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from posttrain.compress.calls import Batch


@dataclass(frozen=True)
class AttentionPart(ABC):
    """Applied once the weights are packed, so that calibration sees attention as it will be met."""

    @property
    def uses_data(self) -> bool:
        """Whether the result depends on the calibration text."""
        return True

    @abstractmethod
    def apply_to_model(self, model: nn.Module, batches: Sequence[Batch], seed: int = 0) -> None:
        """Give the attention modules what they need, and the model the function that heeds it.

        PosttrainError for a model that attends in a way of its own.
        """
