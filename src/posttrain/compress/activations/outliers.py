"""Activations rounded by the token, but for the channels that hold an outlier, which are multiplied as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.compress.activations.dynamic import check_bits, symmetric
from posttrain.compress.activations.quantizer import Activations
from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.inputs import InputStep
from posttrain.trajectory import PosttrainError


@dataclass(frozen=True)
class OutlierColumns(Activations):
    """LLM.int8(): inputs are rounded symmetrically by the token, but for channels with one larger than a threshold.

    Which channels these are is seen when the model runs, among all tokens that run together, so that what a token is
    rounded to depends on its company. They take no part in the tokens' ranges.

    threshold: of an input's size; 0 rounds nothing that is not 0, inf everything.

    Reference: LLM.int8(), 2022, arXiv 2208.07339 (card 136).
    """

    threshold: float = 6.0

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if not self.threshold >= 0:
            raise PosttrainError(f"threshold is {self.threshold}; expected the size of an input, 0 or more")

    def fit(self, moments: InputMoments | None, width: int, name: str) -> OutlierColumnsStep:
        return OutlierColumnsStep(width, self.bits, self.threshold)


class OutlierColumnsStep(InputStep):
    """See `OutlierColumns`."""

    kind = "outlier columns"

    def __init__(self, width: int, bits: int = 8, threshold: float = 6.0) -> None:
        super().__init__(width)
        self.bits, self.threshold = bits, threshold

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "threshold": self.threshold}

    def forward(self, inputs: Tensor) -> Tensor:
        if not inputs.numel():
            return inputs
        x = inputs.float()
        outlier = (x.abs() > self.threshold).reshape(-1, self.width).any(0)
        rest = x.masked_fill(outlier, 0.0)
        rounded = symmetric(rest, rest.abs().amax(-1, keepdim=True), self.bits)
        return torch.where(outlier, x, rounded).to(inputs.dtype)
