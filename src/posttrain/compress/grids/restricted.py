"""A symmetric uniform grid with as many values above 0 as below: the largest weight is a value itself."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from posttrain.compress.grids.uniform import Uniform, UniformLevels, Zero
from posttrain.trajectory import PosttrainError


@dataclass(frozen=True)
class Restricted(Uniform):
    r"""Values :math:`s q` with :math:`s = \max|w| / (2^{b-1} - 1)` and :math:`|q| \le 2^{b-1} - 1`, so that nothing is
    cut off; the code -2^(b-1) is there where a range is searched (`clip`), as in QuaRot.

    Reference: card 000, section 1 (SYM-RESTRICTED).
    """

    bits: int = 8
    group: int = 0
    zero: Zero = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits < 2 or self.zero != "none":
            raise PosttrainError(
                f"a restricted grid of {self.bits} bits with zero {self.zero!r}; expected 2 to 8 bits and zero none"
            )

    def _levels(self, low: Tensor, high: Tensor) -> UniformLevels:
        stretch = self.top / (self.top - 1)  # of 2 max|w| / (2^b - 1), the full grid's scale, to max|w| / (2^(b-1) - 1)
        return super()._levels(stretch * low, stretch * high)
