"""Indices into tables of vectors: several weights of a column, one below the other, share one index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.compress.kernels.dispatch import few_rows
from posttrain.compress.kernels.vectors import LONGEST, vector_product
from posttrain.compress.packed.bits import pack, packed_width, unpack
from posttrain.compress.packed.weight import PackedWeight


@dataclass(frozen=True)
class Books:
    """Sizes of a table of vectors and of the one for what it leaves over.

    length: weights of a vector. first: bits of an index into the table; residual: into the second one, 0 without.
    """

    length: int
    first: int
    residual: int = 0

    @property
    def index_bits(self) -> int:
        return self.first + self.residual

    @property
    def table_bits(self) -> int:
        """Bits of the half-precision tables."""
        return 16 * self.length * (2**self.first + (2**self.residual if self.residual else 0))


def pack_wide(codes: Tensor, bits: int) -> Tensor:
    """`[rows, columns]` integers of up to 24 bits -> `[rows, bytes]` uint8: the low bytes of a row's codes, then the
    next, the last ones in as many bits as are left (see `bits.pack`).
    """
    if not 1 <= bits <= 24:
        raise ValueError(f"codes of {bits} bits; expected 1 to 24")
    return torch.cat([pack((codes >> low) & ((1 << width) - 1), width) for low, width in _planes(bits)], 1)


def unpack_wide(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_wide`: `[rows, columns]` int64."""
    widths = [packed_width(columns, width) for _, width in _planes(bits)]
    found = torch.zeros(packed.shape[0], columns, dtype=torch.int64, device=packed.device)
    for (low, width), part in zip(_planes(bits), packed.split(widths, 1), strict=True):
        found |= unpack(part, width, columns).to(torch.int64) << low
    return found


def _planes(bits: int) -> list[tuple[int, int]]:
    return [(low, min(8, bits - low)) for low in range(0, bits, 8)]


class VectorPart(nn.Module):
    """Columns that share tables: `[rows, columns]` as `[ceil(rows / length), columns]` indices.

    codes: packed (`pack_wide`), the residual's index above the first's. centroids: `[2**first, length]` fp16; residual:
    `[2**residual, length]` fp16 or None.
    """

    codes: Tensor
    centroids: Tensor
    residual: Tensor | None

    def __init__(self, rows: int, columns: int, books: Books) -> None:
        super().__init__()
        self.rows, self.columns, self.books = rows, columns, books
        self.vectors = -(-rows // books.length)
        bytes_a_row = sum(packed_width(columns, width) for _, width in _planes(books.index_bits))
        self.register_buffer("codes", torch.zeros(self.vectors, bytes_a_row, dtype=torch.uint8))
        self.register_buffer("centroids", torch.zeros(2**books.first, books.length, dtype=torch.float16))
        second = torch.zeros(2**books.residual, books.length, dtype=torch.float16) if books.residual else None
        self.register_buffer("residual", second)

    def indices(self) -> tuple[Tensor, Tensor]:
        """`[vectors, columns]` int64 each: into the first table, and into the residual's."""
        codes = unpack_wide(self.codes, self.books.index_bits, self.columns)
        return codes & (2**self.books.first - 1), codes >> self.books.first

    def dequantize(self) -> Tensor:
        """`[rows, columns]` fp32."""
        first, second = self.indices()
        values = self.centroids.float()[first]
        if self.residual is not None:
            values = values + self.residual.float()[second]
        return values.transpose(1, 2).reshape(-1, self.columns)[: self.rows]


class VectorWeight(PackedWeight):
    """Vectors along the output dimension, one index for each; columns in one or several parts with tables of their own.

    order: `[in]` int16 (unsigned), the column that stands at each place, where there are several parts. scale, offset:
    `[in]` fp16 or None: a column is `scale * looked up + offset`.
    """

    format = "vector"
    order: Tensor | None
    scale: Tensor | None
    offset: Tensor | None

    def __init__(self, shape: tuple[int, int], parts: Sequence[tuple[int, Books]], normalised: bool = False) -> None:
        super().__init__(shape)
        rows, columns = self.shape
        self.normalised = normalised
        self.parts = nn.ModuleList([VectorPart(rows, count, books) for count, books in parts])
        self.register_buffer("order", torch.zeros(columns, dtype=torch.int16) if len(parts) > 1 else None)
        for name in ("scale", "offset"):
            self.register_buffer(name, torch.zeros(columns, dtype=torch.float16) if normalised else None)

    @classmethod
    def of(
        cls,
        rows: int,
        parts: Sequence[tuple[Books, Tensor, Tensor, Tensor | None]],
        order: Tensor | None = None,
        normal: tuple[Tensor, Tensor] | None = None,
    ) -> VectorWeight:
        """From parts of (sizes, `[vectors, n]` indices with the residual's above, centroids, residual centroids).

        order: `[in]` the column at each place of the parts laid side by side; must be None for a single part. normal:
        scale and offset of each column.
        """
        made = cls(
            (rows, sum(codes.shape[1] for _, codes, _, _ in parts)),
            [(codes.shape[1], books) for books, codes, _, _ in parts],
            normal is not None,
        )
        for part, (books, codes, centroids, residual) in zip(made._parts(), parts, strict=True):
            part.codes.copy_(pack_wide(codes, books.index_bits))
            part.centroids.copy_(centroids)
            if part.residual is not None and residual is not None:
                part.residual.copy_(residual)
        if (order is not None) != (made.order is not None):
            raise ValueError("several parts need the order of their columns, and one part needs none")
        if made.order is not None and order is not None:
            made.order.copy_(order.to(torch.int32).to(torch.int16))
        if normal is not None:
            assert made.scale is not None
            assert made.offset is not None
            made.scale.copy_(normal[0])
            made.offset.copy_(normal[1])
        return made

    @classmethod
    def empty(cls, shape: tuple[int, int], **settings: Any) -> VectorWeight:
        parts = [(columns, Books(**books)) for columns, books in settings["parts"]]
        return cls(shape, parts, settings["normalised"])

    def settings(self) -> dict[str, Any]:
        return {"parts": [[p.columns, asdict(p.books)] for p in self._parts()], "normalised": self.normalised}

    def _parts(self) -> list[VectorPart]:
        return [part for part in self.parts if isinstance(part, VectorPart)]

    @property
    def counted_bits(self) -> float:
        rows, columns = self.shape
        beside = (16 * columns if len(self.parts) > 1 else 0) + (32 * columns if self.normalised else 0)
        return beside + sum(
            -(-rows // p.books.length) * p.columns * p.books.index_bits + p.books.table_bits for p in self._parts()
        )

    def product(self, inputs: Tensor) -> Tensor:
        if not few_rows(inputs, *(p.codes for p in self._parts())) or any(
            p.books.length > LONGEST for p in self._parts()
        ):
            return super().product(inputs)
        x = inputs.detach().reshape(-1, self.shape[1]).float()
        found = torch.zeros(x.shape[0], self.shape[0], device=x.device)
        if self.scale is not None and self.offset is not None:
            found += (x @ self.offset.float())[:, None]
            x = x * self.scale.float()
        if self.order is not None:
            x = x[:, self.order.long() & 0xFFFF]
        for part, columns in zip(self._parts(), x.split([p.columns for p in self._parts()], 1), strict=True):
            vector_product(columns, part.codes, part.centroids, part.residual, self.shape[0], found)
        return found.to(inputs.dtype).view(*inputs.shape[:-1], -1)

    def dequantize(self) -> Tensor:
        values = torch.cat([part.dequantize() for part in self._parts()], 1)
        if self.order is not None:
            back = torch.argsort(self.order.long() & 0xFFFF)
            values = values[:, back]
        if self.scale is not None and self.offset is not None:
            values = values * self.scale.float() + self.offset.float()
        return values
