"""How many weights of a matrix go, and which are compared with which: what every way of pruning shares."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from posttrain.compress.packed.sparse import NMWeight, SparseWeight
from posttrain.compress.packed.weight import PackedWeight
from posttrain.trajectory import PosttrainError

Across = Literal["layer", "row"]
WIDEST = 256  # places that a byte tells apart


@dataclass(frozen=True)
class Sparsity:
    """A share of the weights goes, those of least score: anywhere, or M - N of every M columns of a row.

    share: of the weights that go. pattern: `N:M`, how many of every M columns stay (then the share is 1 - N/M).
    """

    share: float = 0.5
    pattern: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise PosttrainError(f"sparsity is {self.share}; expected a share of the weights from 0 to below 1")
        if self.pattern:
            kept, among = self._parsed()
            if abs(self.share - 1 + kept / among) > 1e-3:
                raise PosttrainError(
                    f"sparsity is {self.share} and pattern {self.pattern}, which is a sparsity of "
                    f"{1 - kept / among:g}; expected the two to agree"
                )

    def _parsed(self) -> tuple[int, int]:
        found = re.fullmatch(r"(\d+):(\d+)", self.pattern)
        if found is None or not 0 < int(found[1]) < int(found[2]) <= WIDEST:
            raise PosttrainError(f"pattern is {self.pattern!r}; expected N:M with N below M, as in 2:4, or nothing")
        return int(found[1]), int(found[2])

    @property
    def every(self) -> tuple[int, int] | None:
        """(N, M) of the pattern; None where weights go anywhere."""
        return self._parsed() if self.pattern else None

    def check(self, shape: tuple[int, int], name: str) -> None:
        """PosttrainError for a layer whose columns the pattern does not divide."""
        if self.every is not None and shape[1] % self.every[1]:
            raise PosttrainError(
                f"{name} has {shape[1]} input columns, which {self.pattern} does not divide; expected a multiple of "
                f"{self.every[1]}: skip the layer or leave the pattern out"
            )

    def kept(self, score: Tensor, across: Across) -> Tensor:
        """`[out, in]` bool: which weights stay, those of largest score.

        The number is exact; of equal scores the first go. across: whether weights are compared with those of their row
        or of the whole layer, where no pattern says with which.
        """
        if self.every is not None:
            kept, among = self.every
            return largest(score.reshape(-1, among), kept).view_as(score)
        if across == "layer":
            return largest(score.reshape(1, -1), score.numel() - round(self.share * score.numel())).view_as(score)
        return largest(score, score.shape[1] - round(self.share * score.shape[1]))

    def pack(self, weight: Tensor, kept: Tensor, dtype: str) -> PackedWeight:
        """The weights that stay, in the format of the pattern. dtype: they are stored in."""
        if self.every is not None:
            return NMWeight.of(weight, kept, *self.every, dtype)
        return SparseWeight.of(weight, kept, dtype)


def agreeing(sparsity: float, pattern: str) -> Sparsity:
    """What a method function is given: with a pattern, a sparsity of one half that was not asked for follows it."""
    every = re.fullmatch(r"(\d+):(\d+)", pattern)
    if pattern and (every is None or not 0 < int(every[1]) < int(every[2]) <= WIDEST):
        raise PosttrainError(
            f"pattern is {pattern!r}; expected N:M, which keeps N of every M columns of a row, with N from 1 to below "
            f"M and M up to {WIDEST}, as in 2:4"
        )
    if every and sparsity == 0.5:
        sparsity = 1 - int(every[1]) / int(every[2])
    if not 0 < sparsity < 1:
        raise PosttrainError(f"sparsity is {sparsity}; expected a share of the weights above 0 and below 1")
    return Sparsity(sparsity, pattern)


def largest(score: Tensor, count: int) -> Tensor:
    """`[rows, n]` bool: the `count` largest of each row; of equal ones, the last."""
    kept = torch.ones(score.shape, dtype=torch.bool)
    gone = score.argsort(dim=-1, stable=True)[:, : score.shape[1] - count]
    return kept.scatter_(1, gone, False)


def no_bits(bits: float | None, name: str) -> None:
    """PosttrainError where an allocation gives bits to a layer that is pruned."""
    if bits is not None:
        raise PosttrainError(f"{name} was given {bits:g} bits and is pruned; expected no allocation of bits")
