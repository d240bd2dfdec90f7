"""Codes into a table of values: one table for the matrix with a scale a group, or a table for every group and row."""

from __future__ import annotations

import functools
from functools import partial
from typing import Any

import torch
from torch import Tensor

from posttrain.compress.kernels.dispatch import by_panels, few_rows
from posttrain.compress.kernels.library import runs_on
from posttrain.compress.kernels.table import table_product, table_values
from posttrain.compress.packed.bits import pack, packed_width, unpack
from posttrain.compress.packed.scales import Kind, Scales
from posttrain.compress.packed.weight import PackedWeight

_FP4 = (0.0, 1 / 192, 2 / 3, 1.0, 1 / 3, 1 / 2, 1 / 6, 1 / 4)
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# values by code. NF4: the quantiles of a normal distribution, with 0 among them; FP4: that of bitsandbytes, whose codes
# do not ascend; E2M1: that of the OCP microscaling formats. The last two have a sign bit.
BOOKS: dict[str, tuple[float, ...]] = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (*_FP4, *(-v for v in _FP4)),
    "e2m1": (*_E2M1, *(-v for v in _E2M1)),
}  # fmt: skip


class TableWeight(PackedWeight):
    """`w = scale * table[code]`.

    codes: `[out, ceil(in * bits / 8)]` uint8, lowest bits first. scales: `[out, groups]`, see `Scales`. table:
    `[2**bits]` fp32 where it is the matrix's own; a known book is part of the format and takes no room.
    """

    format = "table"
    codes: Tensor
    table: Tensor | None

    def __init__(self, shape: tuple[int, int], bits: int, groups: int, scales: Kind, book: str | None = None) -> None:
        super().__init__(shape)
        rows, columns = self.shape
        self.bits, self.groups, self.kind, self.book = bits, groups, scales, book
        self.register_buffer("codes", torch.zeros(rows, packed_width(columns, bits), dtype=torch.uint8))
        self.scales = Scales(rows, groups, scales)
        self.register_buffer("table", torch.zeros(2**bits) if book is None else None)

    @classmethod
    def of(cls, codes: Tensor, scales: Scales, bits: int, table: Tensor | str) -> TableWeight:
        """From `[out, in]` codes. table: `[2**bits]`, or the name of a book."""
        book = table if isinstance(table, str) else None
        made = cls((codes.shape[0], codes.shape[1]), bits, scales.groups, scales.kind, book)
        made.codes.copy_(pack(codes, bits))
        made.scales = scales
        if not isinstance(table, str):
            assert made.table is not None
            made.table.copy_(table)
        return made

    @classmethod
    def empty(cls, shape: tuple[int, int], **settings: Any) -> TableWeight:
        return cls(shape, **settings)

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "groups": self.groups, "scales": self.kind, "book": self.book}

    @property
    def counted_bits(self) -> float:
        own = 32 * 2**self.bits if self.book is None else 0
        return self.shape[0] * self.shape[1] * self.bits + self.scales.counted_bits + own

    def levels(self) -> Tensor:
        """`[2**bits]` fp32: the values of the codes before they are scaled."""
        if self.table is not None:
            return self.table.float()
        return _book(self.book or "", self.codes.device)

    def product(self, inputs: Tensor) -> Tensor:
        kernel = few_rows(inputs, self.codes)
        if not kernel and not runs_on(inputs, self.codes):
            return super().product(inputs)
        levels, scales = self.levels(), self.scales.for_kernel()
        if kernel:
            return table_product(inputs, self.codes, levels, scales, self.bits)
        make = partial(table_values, self.shape[1], self.codes, levels, scales, self.bits)
        return by_panels(inputs, self.shape, lambda rows, room: make(rows=rows, out=room))

    def dequantize(self) -> Tensor:
        found = looked_up(self.codes, self.bits, self.shape[1], self.levels())
        return (found.view(self.shape[0], self.groups, -1) * self.scales.values()[:, :, None]).reshape(self.shape)


@functools.cache
def _book(name: str, device: torch.device) -> Tensor:
    return torch.tensor(BOOKS[name], device=device)


def looked_up(packed: Tensor, bits: int, columns: int, table: Tensor) -> Tensor:
    """`[out, in]` entries of a table for packed codes; where bytes hold whole codes, one look a byte."""
    if 8 % bits:
        codes = unpack(packed, bits, columns)
        return table.index_select(0, codes.reshape(-1).int()).view(codes.shape)
    every = torch.arange(256, dtype=torch.uint8, device=packed.device)[:, None]
    by_byte = table[unpack(every, bits, 8 // bits).long()]
    return by_byte.index_select(0, packed.reshape(-1).int()).view(packed.shape[0], -1)[:, :columns]


class OwnTables(PackedWeight):
    """`w = table[row, group, code]`: every row of a group of columns has values of its own.

    codes: `[out, ceil(in * bits / 8)]` uint8. tables: `[out, groups, 2**bits]` fp16. widths: `[groups]` int32, the
    columns of each group, which are runs.
    """

    format = "own tables"
    codes: Tensor
    tables: Tensor
    widths: Tensor

    def __init__(self, shape: tuple[int, int], bits: int, groups: int) -> None:
        super().__init__(shape)
        rows, columns = self.shape
        self.bits, self.groups = bits, groups
        self.register_buffer("codes", torch.zeros(rows, packed_width(columns, bits), dtype=torch.uint8))
        self.register_buffer("tables", torch.zeros(rows, groups, 2**bits, dtype=torch.float16))
        self.register_buffer("widths", torch.zeros(groups, dtype=torch.int32))

    @classmethod
    def of(cls, codes: Tensor, tables: Tensor, bits: int, widths: Tensor) -> OwnTables:
        """From `[out, in]` codes, `[out, groups, 2**bits]` values and the widths of the groups."""
        made = cls((codes.shape[0], codes.shape[1]), bits, len(widths))
        made.codes.copy_(pack(codes, bits))
        made.tables.copy_(tables)
        made.widths.copy_(widths)
        return made

    @classmethod
    def empty(cls, shape: tuple[int, int], **settings: Any) -> OwnTables:
        return cls(shape, **settings)

    def settings(self) -> dict[str, Any]:
        return {"bits": self.bits, "groups": self.groups}

    @property
    def counted_bits(self) -> float:
        rows, columns = self.shape
        return rows * (columns * self.bits + self.groups * 16 * 2**self.bits) + 32 * self.groups

    def dequantize(self) -> Tensor:
        place = unpack(self.codes, self.bits, self.shape[1]).long()
        place += group_of(self.widths) * 2**self.bits
        return self.tables.float().flatten(1).gather(1, place)


def group_of(widths: Tensor) -> Tensor:
    """`[columns]` int64: the group of each column, of groups that are runs of these widths."""
    return torch.repeat_interleave(torch.arange(len(widths), device=widths.device), widths.long())
