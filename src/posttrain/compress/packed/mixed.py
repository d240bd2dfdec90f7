"""A matrix whose columns are stored in different formats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.compress.packed.bits import pack, packed_width, unpack
from posttrain.compress.packed.weight import PackedWeight, from_written, written


class MixedColumns(PackedWeight):
    """Some columns are those of one packed matrix, others those of another; each keeps its columns in order.

    parts: the matrices, `[out, its columns]`. part_of: `[ceil(in * bits / 8)]` uint8, the part of each column, in as
    few bits as their number needs: one where there are two.
    """

    format = "mixed columns"
    part_of: Tensor

    def __init__(self, shape: tuple[int, int], parts: Sequence[PackedWeight]) -> None:
        super().__init__(shape)
        if len(parts) < 2 or sum(p.shape[1] for p in parts) != shape[1] or any(p.shape[0] != shape[0] for p in parts):
            raise ValueError(f"parts of shapes {[p.shape for p in parts]} do not make up a matrix of {shape}")
        self.parts = nn.ModuleList(parts)
        self.index_bits = (len(parts) - 1).bit_length()
        self.register_buffer("part_of", torch.zeros(packed_width(shape[1], self.index_bits), dtype=torch.uint8))

    @classmethod
    def of(cls, parts: Sequence[PackedWeight], part_of: Tensor) -> PackedWeight:
        """part_of: `[in]` the number of each column's part. Where all columns are of one part, that part alone."""
        for number, part in enumerate(parts):
            if int((part_of == number).sum()) != part.shape[1]:
                raise ValueError(f"part {number} has {part.shape[1]} columns, {int((part_of == number).sum())} are its")
        there = [number for number, part in enumerate(parts) if part.shape[1]]
        if len(there) == 1:
            return parts[there[0]]
        renumbered = torch.zeros(len(parts), dtype=torch.int64)
        renumbered[there] = torch.arange(len(there))
        made = cls((parts[0].shape[0], len(part_of)), [parts[number] for number in there])
        made.part_of.copy_(pack(renumbered[part_of.long()][None], made.index_bits)[0])
        return made

    @classmethod
    def empty(cls, shape: tuple[int, int], **settings: Any) -> MixedColumns:
        return cls(shape, [from_written(described) for described in settings["parts"]])

    def settings(self) -> dict[str, Any]:
        return {"parts": [written(part) for part in self._parts()]}

    def _parts(self) -> list[PackedWeight]:
        return [part for part in self.parts if isinstance(part, PackedWeight)]

    @property
    def counted_bits(self) -> float:
        return sum(p.counted_bits for p in self._parts()) + self.index_bits * self.shape[1]

    def columns(self) -> list[Tensor]:
        """The columns of each part, ascending."""
        found = unpack(self.part_of[None], self.index_bits, self.shape[1])[0]
        return [torch.nonzero(found == number)[:, 0] for number in range(len(self.parts))]

    def dequantize(self) -> Tensor:
        found = torch.empty(self.shape, device=self.part_of.device)
        for columns, part in zip(self.columns(), self._parts(), strict=True):
            found[:, columns] = part.dequantize()
        return found
