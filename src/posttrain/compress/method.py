"""A compression method: a choice of parts, as the training methods are."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from posttrain.compress.activations.quantizer import Activations
from posttrain.compress.allocate import Allocation
from posttrain.compress.attention_part import AttentionPart
from posttrain.compress.calls import Batch
from posttrain.compress.solvers.solver import Solver
from posttrain.compress.transforms.transform import Transform
from posttrain.trajectory import PosttrainError


@dataclass(frozen=True)
class Calibrated:
    """How much text a method is calibrated on: `samples` windows of `length` tokens."""

    samples: int = 64
    length: int = 512

    def chosen(self, model: nn.Module, given: Sequence[Batch], seed: int) -> Sequence[Batch]:
        """What a float model is calibrated on: the batches that were given, unless a method makes others of them."""
        return given


@dataclass(frozen=True)
class Compression:
    """transform* -> bit allocation -> solver(grid) -> packing.

    transforms: function-preserving changes before. allocation: which layer gets how many bits (None: the grid's).
    solver: picks the codes, on its grid. activations: how the inputs of packed layers are quantized (None: not at all).
    attention: how attention is computed (None: as it is): which tokens a decode step attends to, what is rounded in it;
        settled once the weights are packed.
    calibration: how much text by default. skip: patterns of layers that stay as they are.
    arguments: what the method function was called with (for reports).
    """

    name: str
    solver: Solver
    transforms: tuple[Transform, ...] = ()
    allocation: Allocation | None = None
    activations: Activations | None = None
    attention: AttentionPart | None = None
    calibration: Calibrated = field(default_factory=Calibrated)
    skip: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        damping = getattr(self.solver, "damping", 0.0)  # of all that solve by a Hessian
        if not 0 <= damping < math.inf:
            raise PosttrainError(f"damping is {damping:g}; expected a number from 0 on")

    @property
    def uses_data(self) -> bool:
        """Whether the result depends on the calibration text; if not, any tokens serve to find the layers' order."""
        if self.transforms or self.allocation is not None:
            return True
        parts = (self.activations, self.attention)
        fitted = any(part is not None and part.uses_data for part in parts)
        return fitted or bool(getattr(self.solver, "uses_data", True))

    def replace(self, **parts: Any) -> Compression:
        """The method with other parts."""
        return replace(self, **parts)
