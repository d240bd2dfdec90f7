"""Tables of vectors fitted to a layer's outputs, with the indices fixed: linear least squares by conjugate gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from posttrain.compress.packed.vector import Books


class Coded(Protocol):
    """A run of columns with its indices `[vectors, columns]` and tables, as `solvers.vptq.ColumnPart`."""

    books: Books
    rows: int
    codes: Tensor
    second: Tensor
    table: Tensor
    residual: Tensor | None

    @property
    def columns(self) -> slice: ...


def refitted(weight: Tensor, hessian: Tensor, parts: Sequence[Coded], steps: int) -> None:
    r"""Move the parts' tables so that tr((Ŵ - W) H (Ŵ - W)^T) falls; it is quadratic in them, and is never made larger.

    weight: `[out, in]`; hessian: `[in, in]`; both with columns as the parts run. steps: of conjugate gradient,
    preconditioned with the weight that falls to each centroid. The tables end as half precision holds them.
    """
    tables = _tables(parts)
    gap = weight - looked_up(parts, tables, weight.shape)
    rest = _gathered(parts, gap @ hessian)
    scale = _falling(parts, hessian.diag())
    ahead = [r / s for r, s in zip(rest, scale, strict=True)]
    aim = [a.clone() for a in ahead]
    slope = _dot(rest, ahead)
    first = slope
    for _ in range(steps):
        if slope <= 1e-12 * first or slope <= 0:
            break
        bent = _gathered(parts, looked_up(parts, aim, weight.shape) @ hessian)
        curvature = _dot(aim, bent)
        if curvature <= 0:
            break
        step = slope / curvature
        tables = [t + step * a for t, a in zip(tables, aim, strict=True)]
        rest = [r - step * b for r, b in zip(rest, bent, strict=True)]
        ahead = [r / s for r, s in zip(rest, scale, strict=True)]
        steeper = _dot(rest, ahead)
        aim = [h + steeper / slope * a for h, a in zip(ahead, aim, strict=True)]
        slope = steeper
    _keep(parts, tables)


def looked_up(parts: Sequence[Coded], tables: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """`[out, in]`: what the indices stand for with these tables."""
    found, left = torch.empty(shape[0], shape[1]), list(tables)
    for part in parts:
        values = left.pop(0)[part.codes]
        if part.residual is not None:
            values = values + left.pop(0)[part.second]
        found[:, part.columns] = values.transpose(1, 2).reshape(-1, part.codes.shape[1])[: part.rows]
    return found


def _tables(parts: Sequence[Coded]) -> list[Tensor]:
    return [t for part in parts for t in (part.table, part.residual) if t is not None]


def _keep(parts: Sequence[Coded], tables: Sequence[Tensor]) -> None:
    left = [t.half().float() for t in tables]
    for part in parts:
        part.table = left.pop(0)
        if part.residual is not None:
            part.residual = left.pop(0)


def _gathered(parts: Sequence[Coded], gradient: Tensor) -> list[Tensor]:
    """The transpose of `looked_up`: `[out, in]` summed into tables."""
    found = []
    for part in parts:
        v, (vectors, columns) = part.books.length, part.codes.shape
        padded = torch.zeros(vectors * v, columns)
        padded[: part.rows] = gradient[:, part.columns]
        rows = padded.view(vectors, v, columns).transpose(1, 2).reshape(-1, v)
        found.append(torch.zeros_like(part.table).index_add_(0, part.codes.reshape(-1), rows))
        if part.residual is not None:
            found.append(torch.zeros_like(part.residual).index_add_(0, part.second.reshape(-1), rows))
    return found


def _falling(parts: Sequence[Coded], diagonal: Tensor) -> list[Tensor]:
    """`[k, 1]` for each table: the diagonal summed over the columns of the vectors that point to each centroid."""
    found = []
    for part in parts:
        weights = diagonal[part.columns].expand(part.codes.shape).reshape(-1)
        pairs = [(part.table, part.codes), (part.residual, part.second)]
        for table, codes in pairs:
            if table is not None:
                mass = torch.zeros(len(table)).index_add_(0, codes.reshape(-1), weights)
                found.append(mass.clamp(min=1e-30)[:, None])
    return found


def _dot(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return sum(float((a.double() * b).sum()) for a, b in zip(left, right, strict=True))
