"""A symmetric grid with one scale for a whole matrix."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from posttrain.compress.grids.restricted import Restricted
from posttrain.compress.grids.uniform import UniformLevels
from posttrain.trajectory import PosttrainError


@dataclass(frozen=True)
class WholeMatrix(Restricted):
    r"""Values :math:`s q` with :math:`s = \max|W| / (2^{b-1} - 1)` over the whole matrix.

    It is stored as a grid by rows, whose scales are all the same: 16 bits a row more than it needs, which are counted.

    Reference: Quamba, 2024, arXiv 2410.13229 (card 142).
    """

    most: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group or self.clip != "none":
            raise PosttrainError(
                f"a grid of one scale with group {self.group} and clip {self.clip!r}; expected group 0, and no clipping"
            )

    def settled(self, weight: Tensor) -> WholeMatrix:
        return replace(self, most=float(weight.abs().max()))

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> UniformLevels:
        most = float(weight.abs().max()) if self.most is None else self.most
        end = weight.new_full((len(weight), 1), most)
        return self._levels(-end, end)
