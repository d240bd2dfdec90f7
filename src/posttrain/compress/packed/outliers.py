"""A packed matrix, a few of whose weights are kept in half precision beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.compress.packed.weight import PackedWeight, from_written, written
from posttrain.trajectory import PosttrainError

WIDEST = (1 << 16) - 1  # what 16 bits count to


class WithOutliers(PackedWeight):
    """The weights of `base`, but for those at the outliers' places: compressed sparse rows.

    values: `[count]` fp16. columns: `[count]` int16 (unsigned, as its bits), ascending in each row. a_row:
    `[out]` int16 (the same), how many outliers each row has.
    """

    format = "outliers"
    values: Tensor
    columns: Tensor
    a_row: Tensor

    def __init__(self, base: PackedWeight, count: int) -> None:
        super().__init__(base.shape)
        if base.shape[1] > WIDEST:
            raise PosttrainError(f"outliers of {base.shape[1]} input columns; expected at most {WIDEST}")
        self.base, self.count = base, count
        self.register_buffer("values", torch.zeros(count, dtype=torch.float16))
        self.register_buffer("columns", torch.zeros(count, dtype=torch.int16))
        self.register_buffer("a_row", torch.zeros(base.shape[0], dtype=torch.int16))

    @classmethod
    def of(cls, base: PackedWeight, mask: Tensor, weight: Tensor) -> PackedWeight:
        """mask: `[out, in]` bool, the outliers. weight: `[out, in]` with their values. Without any, the base alone."""
        if not mask.any():
            return base
        made = cls(base, int(mask.sum()))
        made.values.copy_(weight[mask])
        made.columns.copy_(torch.nonzero(mask)[:, 1])  # what is beyond 32,767 keeps its bits
        made.a_row.copy_(mask.sum(1))
        return made

    @classmethod
    def empty(cls, shape: tuple[int, int], **settings: Any) -> WithOutliers:
        return cls(from_written(settings["base"]), settings["count"])

    def settings(self) -> dict[str, Any]:
        return {"base": written(self.base), "count": self.count}

    @property
    def counted_bits(self) -> float:
        return self.base.counted_bits + 32 * self.count + 16 * self.shape[0]

    def dequantize(self) -> Tensor:
        found = self.base.dequantize()
        rows = torch.arange(self.shape[0], device=found.device).repeat_interleave(unsigned(self.a_row))
        found[rows, unsigned(self.columns)] = self.values.float()
        return found


def unsigned(numbers: Tensor) -> Tensor:
    """int16 numbers read as unsigned ones, int64."""
    return numbers.long() & WIDEST
