"""A packed matrix with a low-rank one in half precision beside it: an adapter that stays."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from posttrain.compress.packed.weight import PackedWeight, from_written, written


class LowRankWeight(PackedWeight):
    """`w = base + up @ down`.

    base: the packed matrix. up: `[out, rank]`, down: `[rank, in]`, both fp16.
    """

    format = "low rank"
    up: Tensor
    down: Tensor

    def __init__(self, base: PackedWeight, rank: int) -> None:
        super().__init__(base.shape)
        self.base, self.rank = base, rank
        self.register_buffer("up", torch.zeros(self.shape[0], rank, dtype=torch.float16))
        self.register_buffer("down", torch.zeros(rank, self.shape[1], dtype=torch.float16))

    @classmethod
    def of(cls, base: PackedWeight, up: Tensor, down: Tensor) -> LowRankWeight:
        made = cls(base, up.shape[1])
        made.up.copy_(up)
        made.down.copy_(down)
        return made

    @classmethod
    def empty(cls, shape: tuple[int, int], **settings: Any) -> LowRankWeight:
        return cls(from_written(settings["base"]), settings["rank"])

    def settings(self) -> dict[str, Any]:
        return {"base": written(self.base), "rank": self.rank}

    @property
    def counted_bits(self) -> float:
        return self.base.counted_bits + 16 * self.rank * (self.shape[0] + self.shape[1])

    def dequantize(self) -> Tensor:
        return self.base.dequantize() + self.up.float() @ self.down.float()

    def product(self, inputs: Tensor) -> Tensor:
        low = F.linear(inputs, self.down.to(inputs.dtype))
        return self.base.product(inputs) + F.linear(low, self.up.to(inputs.dtype))
