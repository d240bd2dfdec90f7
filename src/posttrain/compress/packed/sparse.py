"""Matrices many of whose weights are 0: a mask and what is left, or N of every M columns with their places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.compress.packed.bits import pack, packed_width, unpack
from posttrain.compress.packed.weight import PackedWeight
from posttrain.trajectory import PosttrainError

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
LARGEST = torch.finfo(torch.float16).max


def stored_as(weight: Tensor) -> str:
    """How kept weights are stored: in bf16 where that holds each of them exactly (a bf16 model) or where fp16 would
    overflow, else in fp16, which is more exact.
    """
    exact = torch.equal(weight.bfloat16().float(), weight)
    return "bfloat16" if exact or float(weight.abs().amax()) > LARGEST else "float16"


class SparseWeight(PackedWeight):
    """Weights anywhere in the matrix, and a bit for each place that says whether one is there.

    mask: `[out, ceil(in / 8)]` uint8, lowest bits first. values: `[count]` fp16 or bf16, row after row.
    """

    format = "sparse"
    mask: Tensor
    values: Tensor

    def __init__(self, shape: tuple[int, int], count: int, dtype: str) -> None:
        super().__init__(shape)
        self.count, self.dtype = count, dtype
        self.register_buffer("mask", torch.zeros(shape[0], packed_width(shape[1], 1), dtype=torch.uint8))
        self.register_buffer("values", torch.zeros(count, dtype=DTYPES[dtype]))

    @classmethod
    def of(cls, weight: Tensor, kept: Tensor, dtype: str = "float16") -> SparseWeight:
        """weight: `[out, in]`. kept: `[out, in]` bool."""
        made = cls((weight.shape[0], weight.shape[1]), int(kept.sum()), dtype)
        made.mask.copy_(pack(kept, 1))
        made.values.copy_(weight[kept])
        return made

    @classmethod
    def empty(cls, shape: tuple[int, int], **settings: Any) -> SparseWeight:
        return cls(shape, **settings)

    def settings(self) -> dict[str, Any]:
        return {"count": self.count, "dtype": self.dtype}

    @property
    def counted_bits(self) -> float:
        return self.shape[0] * self.shape[1] + 16 * self.count

    def dequantize(self) -> Tensor:
        kept = unpack(self.mask, 1, self.shape[1]).bool()
        found = torch.zeros(self.shape, device=kept.device)
        found[kept] = self.values.float()
        return found


class NMWeight(PackedWeight):
    """`kept` weights of every `of` columns of a row, with their places among these.

    values: `[out, in * kept / of]` fp16 or bf16. places: `[out, ceil(in * kept / of * b / 8)]` uint8, b = log2(of)
    bits each, ascending among the columns that belong together: as hardware with 2:4 sparsity has it.
    """

    format = "n:m"
    values: Tensor
    places: Tensor

    def __init__(self, shape: tuple[int, int], kept: int, of: int, dtype: str) -> None:
        super().__init__(shape)
        rows, columns = self.shape
        if columns % of:
            raise PosttrainError(f"{kept}:{of} sparsity of {columns} input columns; expected a multiple of {of}")
        self.kept, self.among, self.dtype = kept, of, dtype
        self.index_bits = max(1, (of - 1).bit_length())
        count = columns // of * kept
        self.register_buffer("values", torch.zeros(rows, count, dtype=DTYPES[dtype]))
        self.register_buffer("places", torch.zeros(rows, packed_width(count, self.index_bits), dtype=torch.uint8))

    @classmethod
    def of(cls, weight: Tensor, mask: Tensor, kept: int, of: int, dtype: str = "float16") -> NMWeight:
        """weight: `[out, in]`. mask: `[out, in]` bool, with `kept` of every `of` columns."""
        rows, columns = weight.shape
        made = cls((rows, columns), kept, of, dtype)
        if not (mask.view(rows, -1, of).sum(-1) == kept).all():
            raise ValueError(f"the mask does not keep {kept} of every {of} columns")
        made.values.copy_(weight[mask].view(rows, -1))
        made.places.copy_(pack(torch.nonzero(mask)[:, 1].view(rows, -1) % of, made.index_bits))
        return made

    @classmethod
    def empty(cls, shape: tuple[int, int], **settings: Any) -> NMWeight:
        return cls(shape, **settings)

    def settings(self) -> dict[str, Any]:
        return {"kept": self.kept, "of": self.among, "dtype": self.dtype}

    @property
    def counted_bits(self) -> float:
        rows, columns = self.shape
        return rows * (columns // self.among) * self.kept * (16 + self.index_bits)

    def dequantize(self) -> Tensor:
        count = self.values.shape[1]
        places = unpack(self.places, self.index_bits, count).long()
        starts = torch.arange(count, device=places.device) // self.kept * self.among
        found = torch.zeros(self.shape, device=places.device)
        return found.scatter_(1, places + starts, self.values.float())
