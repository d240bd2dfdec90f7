"""A packed matrix, a few of whose weights are kept in half precision beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.compress.packed.weight import PackedWeight, from_written, written
from posttrain.trajectory import PosttrainError

WIDEST = 1 << 16  # columns that 16 bits number


class WithOutliers(PackedWeight):
    """The weights of `base`, but for those at the outliers' places: compressed sparse rows.

    values: `[count]` fp16. columns: `[count]` int16 (unsigned, as its bits), ascending in each row. ends: `[out]`
    int32, where the outliers of each row end.
    """

    format = "outliers"
    values: Tensor
    columns: Tensor
    ends: Tensor

    def __init__(self, base: PackedWeight, count: int) -> None:
        super().__init__(base.shape)
        if base.shape[1] > WIDEST:
            raise PosttrainError(f"outliers of {base.shape[1]} input columns; expected at most {WIDEST}")
        self.base, self.count = base, count
        self.register_buffer("values", torch.zeros(count, dtype=torch.float16))
        self.register_buffer("columns", torch.zeros(count, dtype=torch.int16))
        self.register_buffer("ends", torch.zeros(base.shape[0], dtype=torch.int32))

    @classmethod
    def of(cls, base: PackedWeight, mask: Tensor, weight: Tensor) -> PackedWeight:
        """mask: `[out, in]` bool, the outliers. weight: `[out, in]` with their values. Without any, the base alone."""
        if not mask.any():
            return base
        made = cls(base, int(mask.sum()))
        made.values.copy_(weight[mask])
        made.columns.copy_(torch.nonzero(mask)[:, 1].to(torch.int32).to(torch.int16))
        made.ends.copy_(mask.sum(1).cumsum(0))
        return made

    @classmethod
    def empty(cls, shape: tuple[int, int], **settings: Any) -> WithOutliers:
        return cls(from_written(settings["base"]), settings["count"])

    def settings(self) -> dict[str, Any]:
        return {"base": written(self.base), "count": self.count}

    @property
    def counted_bits(self) -> float:
        return self.base.counted_bits + 32 * self.count + 32 * self.shape[0]

    def dequantize(self) -> Tensor:
        found = self.base.dequantize()
        starts = torch.cat([self.ends.new_zeros(1), self.ends[:-1]])
        rows = torch.arange(self.shape[0], device=found.device).repeat_interleave((self.ends - starts).long())
        found[rows, self.columns.long() & (WIDEST - 1)] = self.values.float()
        return found
