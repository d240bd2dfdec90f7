"""BiLLM: salient columns in two binary planes, the rest in one, split by size into two bells."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from posttrain.compress.grids.binary import Binary, BinaryLevels, binarised, half, signed
from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.mixed import MixedColumns
from posttrain.compress.packed.planes import BinaryWeight
from posttrain.compress.packed.table import OwnTables
from posttrain.compress.packed.weight import PackedWeight
from posttrain.compress.solvers.gptq import feed_back, inverse_factor, prepared
from posttrain.compress.solvers.solver import LayerSolver
from posttrain.trajectory import PosttrainError

QUANTILES = torch.linspace(0.10, 0.90, 81)  # of the sizes of a block's weights, where the split is looked for
Searched = Literal["weights", "saliency"]


@dataclass(frozen=True)
class BiLLM(LayerSolver):
    r"""Binarises block after block of columns; errors are carried to the later blocks as in GPTQ, not within a block.

    With the saliency `S = w^2 / U_jj^2`, the columns of largest sum are salient, as many as lose least when they and
    the rest are binarised twice; they are stored so (the plane of the residual beside the first). The other weights are
    split at a size p, again where least is lost, and either part of a row has a mean and a scale of its own.

    block: columns. salient: at most so many of a block, and one less than its columns. damping: λ of GPTQ.
    searched: what both searches measure their loss on: the weights, or the saliency as the authors' code does.

    Bits a weight: 2 (a sign, and a second sign or the side of the split) + 112 / block.

    Reference: BiLLM, 2024, arXiv 2402.04291 (card 000, section 7).
    """

    block: int = 128
    salient: int = 49
    damping: float = 0.01
    searched: Searched = "weights"

    def __post_init__(self) -> None:
        if self.block < 2 or self.salient < 1:
            raise PosttrainError(f"block {self.block}, salient {self.salient}: expected blocks of 2, 1 salient column")
        if self.searched not in ("weights", "saliency"):
            raise PosttrainError(f"searched is {self.searched!r}; expected weights or saliency")

    def solve(self, weight: Tensor, moments: InputMoments | None, bits: float | None, name: str) -> PackedWeight:
        assert moments is not None
        if bits is not None:
            raise PosttrainError(f"{name}: an allocation gives it {bits:g} bits; BiLLM has one size for every layer")
        weight, hessian = prepared(weight, moments, name)
        factor = inverse_factor(hessian, self.damping, name)
        diagonal, blocks = factor.diag(), list[Binarised]()

        def round_column(column: int, now: Tensor, whole: Tensor) -> Tensor:
            at = column % self.block
            if at == 0:
                part = slice(column, column + self.block)
                blocks.append(self.binarised(whole[:, part], diagonal[part]))
            return blocks[-1].values[:, at : at + 1]

        feed_back(weight, factor, round_column, self.block, within=False)
        return packed_blocks(blocks)

    def binarised(self, weight: Tensor, diagonal: Tensor) -> Binarised:
        """A block of `[rows, n]` weights. diagonal: `[n]` U_jj."""
        saliency = (weight / diagonal) ** 2
        searched = saliency if self.searched == "saliency" else weight
        order = saliency.sum(0).argsort(descending=True, stable=True)
        most = min(self.salient, weight.shape[1] - 1)
        losses = [twice_loss(searched[:, order[:k]]) + twice_loss(searched[:, order[k:]]) for k in range(1, most + 1)]
        salient = torch.zeros(weight.shape[1], dtype=torch.bool)
        if losses:
            salient[order[: 1 + min(range(most), key=lambda i: float(losses[i]))]] = True
        inner = split(searched[:, ~salient], int(salient.sum()))
        return Binarised.of(weight, salient, inner)


@dataclass(frozen=True)
class Binarised:
    """A block as it will be stored.

    values: `[rows, n]`. salient: `[n]` bool; levels: of the salient columns, with their codes; tables: `[rows, 4]` fp32
    values of the others' codes, whose bit 0 is the sign and bit 1 the outer part.
    """

    values: Tensor
    salient: Tensor
    levels: BinaryLevels
    salient_codes: Tensor
    tables: Tensor
    codes: Tensor

    @classmethod
    def of(cls, weight: Tensor, salient: Tensor, inner: Tensor) -> Binarised:
        """inner: `[rows, others]` bool, the side of the split."""
        chosen, others = weight[:, salient], weight[:, ~salient]
        levels = Binary(bits=2).fit(chosen) if chosen.shape[1] else BinaryLevels(*_nothing(len(weight)))
        salient_codes = levels.nearest(chosen)
        tables, codes = [], torch.zeros(others.shape, dtype=torch.int64)
        for bit, part in ((0, inner), (2, ~inner)):
            mean, scale = binarised(others, part)
            mean = half(mean)
            tables += [half(mean - scale), half(mean + scale)]
            codes = torch.where(part, bit + (others >= mean).long(), codes)
        table = torch.cat(tables, 1)
        values = torch.empty_like(weight)
        values[:, salient], values[:, ~salient] = levels.values(salient_codes), table.gather(1, codes)
        return cls(values, salient, levels, salient_codes, table, codes)


def _nothing(rows: int) -> tuple[Tensor, Tensor]:
    return torch.zeros(rows, 1), torch.zeros(rows, 2)


def twice_loss(weight: Tensor) -> Tensor:
    """What two binarisations, each by the mean and the mean distance from it, leave of `[rows, n]` weights, squared."""
    mean, scale = binarised(weight)
    left = weight - mean
    left = left - signed(left >= 0) * scale
    mean, scale = binarised(left)
    return ((left - mean) ** 2).sum() - weight.shape[1] * (scale**2).sum()


def split(weight: Tensor, absent: int) -> Tensor:
    """`[rows, n]` bool: the weights below the size p that loses least when either side is binarised once.

    p is one of 81 quantiles of the sizes; `absent` columns count as zeros among them.
    """
    sizes = weight.abs()
    counted = torch.cat([sizes.flatten(), sizes.new_zeros(absent * len(weight))])
    tried = torch.quantile(counted, QUANTILES.to(sizes))
    square, plain, best = (weight**2).sum(), weight.sum(1, keepdim=True), None
    for size in tried.unique():
        inner = sizes < size
        count = inner.sum(1, keepdim=True).float()
        total = (weight * inner).sum(1, keepdim=True)
        means = torch.where(inner, total / count.clamp(min=1), (plain - total) / (weight.shape[1] - count).clamp(min=1))
        away = (weight - means).abs()
        near = (away * inner).sum(1, keepdim=True)
        far, outer = away.sum(1, keepdim=True) - near, weight.shape[1] - count
        # sum (w - m - a s)^2 = sum w^2 - n m^2 - n a^2 with m the mean and a the mean of |w - m|
        explained = (total**2 + near**2) / count.clamp(min=1) + ((plain - total) ** 2 + far**2) / outer.clamp(min=1)
        loss = float(square - explained.sum())
        if best is None or loss < best[0]:
            best = (loss, inner)
    assert best is not None
    return best[1]


def packed_blocks(blocks: list[Binarised]) -> PackedWeight:
    """The blocks side by side: salient columns as two planes, the others as codes of tables, a group a block."""
    salient = torch.cat([block.salient for block in blocks])
    counts = torch.tensor([int(block.salient.sum()) for block in blocks])
    widths = torch.tensor([len(block.salient) for block in blocks])
    codes = torch.cat([block.salient_codes for block in blocks], 1)
    twice = BinaryWeight.of(
        torch.stack([codes & 1, codes >> 1]),
        torch.stack([block.levels.scale for block in blocks], -1).transpose(0, 1),
        torch.cat([block.levels.offset for block in blocks], 1),
        counts,
    )
    tables = torch.stack([block.tables for block in blocks], 1)
    once = OwnTables.of(torch.cat([block.codes for block in blocks], 1), tables, 2, widths - counts)
    return MixedColumns.of([once, twice], salient.long())
