"""VPTQ: GPTQ's column loop with vectors in the place of single weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.vector import Books, VectorWeight
from posttrain.compress.packed.weight import PackedWeight
from posttrain.compress.solvers.centroids import refitted
from posttrain.compress.solvers.gptq import feed_back, inverse_factor, prepared
from posttrain.compress.solvers.kmeans import nearest, weighted_kmeans
from posttrain.compress.solvers.solver import LayerSolver
from posttrain.trajectory import PosttrainError

ONE_BOOK = 12  # the most bits of an index into one table; longer ones are split over two
LENGTHS = {1: 12, 2: 6, 3: 4, 4: 6}  # the paper's vector length by bits
NARROWEST = 1e-6  # a column's range below which it counts as constant


@dataclass(frozen=True)
class VPTQ(LayerSolver):
    r"""Columns one after the other: each is cut into vectors along the output dimension, every vector takes the nearest
    centroid, and the column's error is carried to later columns as GPTQ does.

    Within a column all vectors have the same weight in the layer's error, so the nearest centroid is the best one.
    Centroids come from k-means in which a column's vectors weigh H_jj. With a residual table there are two passes: the
    first yields what the first table leaves over, the second rounds to the sum of both from the start.

    bits: of an index, a weight. vector: weights that share one (0: the paper's length for these bits, or the longest
        shorter one whose tables cost at most `overhead` bits a weight in this layer).
    residual: bits of an index that go to a residual table; 0 for none, but an index of more than 12 bits is halved.
    overhead: see vector. groups: tables of their own for so many runs of columns. outliers: the share of columns, those
        with the largest H_jj, that get a table of their own with one bit more a weight. damping, block: as of GPTQ.
    permute: columns by falling H_jj. normalise: look vectors up in columns scaled to [0, 1].
    iterations: of k-means, at most. refit: steps of conjugate gradient that fit the centroids to the layer's outputs
        once the indices are fixed. seed: of k-means.

    Reference: VPTQ, 2024, arXiv 2409.17066 (card 139).
    """

    bits: int = 2
    vector: int = 0
    residual: int = 0
    overhead: float = 0.15
    groups: int = 1
    outliers: float = 0.0
    damping: float = 0.01
    block: int = 128
    permute: bool = True
    normalise: bool = False
    iterations: int = 25
    refit: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise PosttrainError(f"bits is {self.bits}; VPTQ has 1 to 8 a weight")
        if self.vector and not self.bits <= self.vector * self.bits <= 2 * ONE_BOOK:
            raise PosttrainError(
                f"vectors of {self.vector} weights at {self.bits} bits have {self.vector * self.bits} bits an index; "
                f"expected at most {2 * ONE_BOOK}: choose vector up to {2 * ONE_BOOK // self.bits}, or 0"
            )
        if self.residual and not 0 < self.residual < self.vector * self.bits:
            raise PosttrainError(
                f"residual is {self.residual}; expected 0, or fewer bits than an index has, {self.vector * self.bits} "
                f"(vector times bits)"
            )
        if self.groups < 1 or not 0 <= self.outliers < 1:
            raise PosttrainError(f"groups is {self.groups}, outliers {self.outliers}; expected 1 or more, and a share")

    def check(self, shape: tuple[int, int], name: str) -> None:
        if self.vector > shape[0]:
            raise PosttrainError(f"vectors of {self.vector} weights are longer than the {shape[0]} rows of {name}")
        if self.groups > shape[1]:
            raise PosttrainError(f"{self.groups} groups are more than the {shape[1]} columns of {name}")

    def solve(self, weight: Tensor, moments: InputMoments | None, bits: float | None, name: str) -> PackedWeight:
        assert moments is not None
        weight, hessian = prepared(weight, moments, name)
        plain = moments.hessian
        normal = normalisation(weight) if self.normalise else None
        if normal is not None:
            scale, offset = normal
            weight = (weight - offset) / scale
            hessian, plain = hessian * scale * scale[:, None], plain * scale * scale[:, None]
        order = torch.arange(weight.shape[1])
        if self.permute or self.outliers:
            order = torch.argsort(plain.diag(), descending=True, stable=True)
        weight, hessian, plain = weight[:, order], hessian[order][:, order], plain[order][:, order]
        factor = inverse_factor(hessian, self.damping, name)
        parts = self.parts(weight, plain.diag(), self.bits if bits is None else round(bits))
        quantize_columns(weight, factor, parts, self.block)
        if any(part.books.residual for part in parts):
            for part in parts:
                part.fit_residual(plain.diag(), self.iterations, self.seed)
            quantize_columns(weight, factor, parts, self.block)
        if self.refit:
            damped = plain + self.damping * plain.diag().mean() * torch.eye(len(plain))
            refitted(weight, damped, parts, self.refit)
        return packed(weight.shape[0], parts, order, normal)

    def parts(self, weight: Tensor, importance: Tensor, bits: int) -> list[ColumnPart]:
        """The runs of (ordered) columns that have tables of their own, with the first tables fitted."""
        rows, columns = weight.shape
        first = round(self.outliers * columns)
        share = self.overhead / (self.groups + bool(first))
        limit = share * rows * columns
        books = Books(self.vector, bits * self.vector - self.residual, self.residual) if self.residual else None
        books = books or sizes(bits, rows, limit, self.vector)
        runs = [(0, first, sizes(bits + 1, rows, limit))] if first else []
        for places in torch.arange(first, columns).tensor_split(self.groups):
            runs.append((int(places[0]), len(places), books))
        made = []
        for start, count, each in runs:
            part = ColumnPart(start, count, each, rows)
            part.fit(weight, importance, self.iterations, self.seed)
            made.append(part)
        return made


def sizes(bits: int, rows: int, limit: float, length: int = 0) -> Books:
    """Tables for `bits` a weight: with vectors of `length`, or (0) of the longest, up to the paper's, whose tables take
    at most `limit` bits.
    """

    def books(v: int) -> Books:
        index = bits * v
        return Books(v, index) if index <= ONE_BOOK else Books(v, -(-index // 2), index // 2)

    if length:
        return books(min(length, 2 * ONE_BOOK // bits))
    for v in range(min(LENGTHS.get(bits, 2 * ONE_BOOK // bits), rows), 1, -1):
        if books(v).table_bits <= limit:
            return books(v)
    return books(1)


class ColumnPart:
    """A run of columns that share tables, while they are solved.

    codes: `[vectors, count]` indices into the first table, second: into the residual one. left: `[rows, count]` what
    the first table left over of the corrected weights. table, residual: as half precision holds them.
    """

    def __init__(self, start: int, count: int, books: Books, rows: int) -> None:
        self.start, self.count, self.books, self.rows = start, count, books, rows
        vectors = -(-rows // books.length)
        self.codes = torch.zeros(vectors, count, dtype=torch.int64)
        self.second = torch.zeros(vectors, count, dtype=torch.int64)
        self.left = torch.zeros(rows, count)
        self.table: Tensor = torch.zeros(2**books.first, books.length)
        self.residual: Tensor | None = None

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + self.count)

    def fit(self, weight: Tensor, importance: Tensor, iterations: int, seed: int) -> None:
        """The first table, from the weights of its columns."""
        self.table = self._centroids(weight[:, self.columns], importance, self.books.first, iterations, seed)

    def fit_residual(self, importance: Tensor, iterations: int, seed: int) -> None:
        """The second table, from what the first one left over."""
        if self.books.residual:
            self.residual = self._centroids(self.left, importance, self.books.residual, iterations, seed)

    def _centroids(self, values: Tensor, importance: Tensor, bits: int, iterations: int, seed: int) -> Tensor:
        v = self.books.length
        whole = self.rows // v  # an incomplete vector at the end has no say
        vectors = values[: whole * v].T.reshape(-1, v)
        weights = importance[self.columns].repeat_interleave(whole)
        return weighted_kmeans(vectors, weights, 2**bits, iterations=iterations, seed=seed).half().float()

    def round(self, place: int, column: Tensor) -> Tensor:
        """The values `[rows]` that a corrected column takes; keeps the indices."""
        v, found = self.books.length, torch.empty_like(column)
        whole = self.rows // v * v
        if whole:
            found[:whole] = self._looked_up(place, slice(0, whole // v), column[:whole].view(-1, v)).reshape(-1)
        if whole < self.rows:  # the incomplete vector is compared on what there is of it
            found[whole:] = self._looked_up(place, slice(whole // v, None), column[None, whole:])[0]
        self.left[:, place] = column - found
        return found

    def _looked_up(self, place: int, vectors: slice, given: Tensor) -> Tensor:
        table = self.table[:, : given.shape[1]]
        index = nearest(given, table)
        self.codes[vectors, place] = index
        values = table[index]
        if self.residual is not None:
            table = self.residual[:, : given.shape[1]]
            index = nearest(given - values, table)
            self.second[vectors, place] = index
            values = values + table[index]
        return values


def quantize_columns(weight: Tensor, factor: Tensor, parts: list[ColumnPart], block: int = 128) -> Tensor:
    """GPTQ's loop over `[out, in]` columns with vector rounding; the quantized weight. The parts keep the indices."""
    part_of = [part for part in parts for _ in range(part.count)]

    def round_column(column: int, now: Tensor, whole: Tensor) -> Tensor:
        part = part_of[column]
        return part.round(column - part.start, now[:, 0])[:, None]

    return feed_back(weight, factor, round_column, block)


def normalisation(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Range and minimum of each column, `[in]` each, as half precision holds them; a constant column has range 1."""
    offset = weight.amin(0).half().float()
    scale = (weight.amax(0) - offset).half().float()
    return torch.where(scale < NARROWEST, torch.ones_like(scale), scale), offset


def packed(
    rows: int, parts: list[ColumnPart], order: Tensor, normal: tuple[Tensor, Tensor] | None = None
) -> VectorWeight:
    """What the parts found, as it is stored. order: the column at each place; a single part is stored in the columns'
    own order, since all share its tables.
    """
    stored = []
    for part in parts:
        codes = part.codes | part.second << part.books.first if part.books.residual else part.codes
        if len(parts) == 1:
            codes = codes[:, torch.argsort(order)]
        stored.append((part.books, codes, part.table, part.residual))
    return VectorWeight.of(rows, stored, order if len(parts) > 1 else None, normal)
