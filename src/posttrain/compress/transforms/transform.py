"""A transform changes a model's weights without changing what it computes, so that they are easier to compress."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from posttrain.compress.walk import Block


@dataclass(frozen=True)
class Transform:
    """Function-preserving: float outputs before and after agree to 1e-4, which tests hold.

    Some look at the whole model before the walk, others at each block with its calibration inputs; a transform
    overrides what it needs. One that does not fit the architecture raises PosttrainError and says why.
    """

    def apply_to_model(self, model: nn.Module) -> None:
        """Change the whole model, before anything is calibrated."""

    def apply_to_block(self, block: Block) -> None:
        """Change one block, which has its inputs and statistics at hand, before it is solved."""
