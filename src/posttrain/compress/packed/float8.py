"""Eight-bit floating-point numbers with a scale a group: the bits are those that hardware multiplies."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from posttrain.compress.packed.weight import PackedWeight

Kind = Literal["e4m3", "e5m2"]
DTYPES: dict[str, torch.dtype] = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


class Float8Weight(PackedWeight):
    """`w = scale * number`.

    codes: `[out, in]` uint8, the bits of the numbers. scale: `[out, groups]` fp32.
    """

    format = "float8"
    codes: Tensor
    scale: Tensor

    def __init__(self, shape: tuple[int, int], groups: int, kind: Kind) -> None:
        super().__init__(shape)
        rows, columns = self.shape
        self.groups, self.kind = groups, kind
        self.register_buffer("codes", torch.zeros(rows, columns, dtype=torch.uint8))
        self.register_buffer("scale", torch.zeros(rows, groups))

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, kind: Kind) -> Float8Weight:
        """From `[out, in]` codes and `[out, groups]` scales."""
        made = cls((codes.shape[0], codes.shape[1]), scale.shape[1], kind)
        made.codes.copy_(codes)
        made.scale.copy_(scale)
        return made

    @classmethod
    def empty(cls, shape: tuple[int, int], **settings: Any) -> Float8Weight:
        return cls(shape, **settings)

    def settings(self) -> dict[str, Any]:
        return {"groups": self.groups, "kind": self.kind}

    @property
    def counted_bits(self) -> float:
        return self.shape[0] * (8 * self.shape[1] + 32 * self.groups)

    def dequantize(self) -> Tensor:
        numbers = self.codes.view(DTYPES[self.kind]).float().view(self.shape[0], self.groups, -1)
        return (numbers * self.scale[:, :, None]).reshape(self.shape)
