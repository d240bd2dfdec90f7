"""State-space mixers taken apart, so that all of their layers are called and what is between them can be rounded."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from posttrain.compress.transforms.transform import Transform
from posttrain.models.mixers import take_apart
from posttrain.trajectory import PosttrainError


@dataclass(frozen=True)
class MixersApart(Transform):
    """Every Mamba mixer is replaced by one that computes the same and calls each of its layers (`models.mixers`)."""

    def apply_to_model(self, model: nn.Module) -> None:
        if not take_apart(model):
            raise PosttrainError(
                f"{type(model).__name__} has no Mamba mixer to take apart; expected a state-space model such as Mamba"
            )
