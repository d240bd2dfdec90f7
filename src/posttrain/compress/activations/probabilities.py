"""What rounds attention probabilities: on levels that fall by a factor, or that a tangent spreads.

Their statistics are those of single numbers (`InputMoments` of width 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from posttrain.compress.activations.dynamic import check_bits, unless_zero
from posttrain.compress.activations.percentile import QUANTILES, check_quantiles, quantile, sample
from posttrain.compress.activations.quantizer import Activations
from posttrain.compress.grids.grid import Levels
from posttrain.compress.grids.logarithm import LogLevels
from posttrain.compress.grids.tangent import TangentLevels, limit
from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.inputs import InputStep
from posttrain.trajectory import PosttrainError

KEPT = 16384  # probabilities that levels are fitted to
CENTRES = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8)
SLOPES = (0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.99)  # shares of the limit


@dataclass(frozen=True)
class Logarithm(Activations):
    """Powers of two (or of its root) below a largest value δ, the quantile of the calibration that loses least.

    root: steps of the root of two, as the paper has them; its scale and shift are then those of a base of two
    (`LogLevels.shifted`).

    Reference: RepQ-ViT, 2022, arXiv 2212.08254 (card 029).
    """

    bits: int = 4
    root: bool = True
    quantiles: tuple[float, ...] = QUANTILES

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_quantiles(self.quantiles)

    @property
    def uses_data(self) -> bool:
        return True

    @property
    def keep(self) -> int:
        return KEPT

    def fit(self, moments: InputMoments | None, width: int, name: str) -> LogStep:
        kept = sample(moments, name).flatten().sort().values
        tried = [LogLevels(unless_zero(quantile(kept, p)), self.bits, self.root) for p in self.quantiles]
        made = LogStep(width, self.bits, self.root)
        made.scale.copy_(min(tried, key=lambda levels: error(levels, kept)).scale)
        return made


class LogStep(InputStep):
    """See `Logarithm`. scale: δ, an fp32 number."""

    kind = "logarithm"
    scale: Tensor

    def __init__(self, width: int, bits: int = 4, root: bool = True) -> None:
        super().__init__(width)
        self.bits, self.root = bits, root
        self.register_buffer("scale", torch.ones(()))

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "root": self.root}

    def forward(self, inputs: Tensor) -> Tensor:
        levels = LogLevels(self.scale, self.bits, self.root)
        return levels.shifted(levels.nearest(inputs.float())).to(inputs.dtype)


@dataclass(frozen=True)
class Tangent(Activations):
    """Levels that a tangent spreads between 0 and a largest value A, with the A, c and β that lose least (TanQ).

    centre: c, slope: β as a share of its limit; None searches them. quantiles: of the calibration, that A may be.

    Reference: DopQ-ViT, 2024, arXiv 2408.03291 (card 028).
    """

    bits: int = 4
    centre: float | None = None
    slope: float | None = None
    quantiles: tuple[float, ...] = QUANTILES

    def __post_init__(self) -> None:
        check_bits(self.bits)
        check_quantiles(self.quantiles)
        for name in ("centre", "slope"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise PosttrainError(f"{name} is {value}; expected a share between 0 and 1, or None to search it")

    @property
    def uses_data(self) -> bool:
        return True

    @property
    def keep(self) -> int:
        return KEPT

    def fit(self, moments: InputMoments | None, width: int, name: str) -> TangentStep:
        kept = sample(moments, name).flatten().sort().values
        mosts = [float(quantile(kept, p)) or 1.0 for p in self.quantiles]
        centres = CENTRES if self.centre is None else (self.centre,)
        slopes = SLOPES if self.slope is None else (self.slope,)
        tried = [TangentLevels(a, c, s * limit(c), self.bits) for a in mosts for c in centres for s in slopes]
        best = min(tried, key=lambda levels: error(levels, kept))
        made = TangentStep(width, self.bits)
        made.shape.copy_(torch.tensor([best.most, best.centre, best.slope], dtype=torch.float64))
        return made


class TangentStep(InputStep):
    """See `Tangent`. shape: `[3]` fp64: A, c and β."""

    kind = "tangent"
    shape: Tensor

    def __init__(self, width: int, bits: int = 4) -> None:
        super().__init__(width)
        self.bits = bits
        self.register_buffer("shape", torch.tensor([1.0, 0.5, 1.0], dtype=torch.float64))

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits}

    @property
    def levels(self) -> TangentLevels:
        most, centre, slope = self.shape.tolist()
        return TangentLevels(most, centre, slope, self.bits)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.levels.rounded(inputs).to(inputs.dtype)


def error(levels: Levels, numbers: Tensor) -> float:
    """Summed squared error of rounding numbers."""
    return float((levels.rounded(numbers) - numbers).square().sum())
