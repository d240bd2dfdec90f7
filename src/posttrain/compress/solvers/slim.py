"""SliM-LLM: groups of columns get one bit more or less by their salience, and ranges heed their salient weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from posttrain.compress.grids.grid import Grid
from posttrain.compress.grids.uniform import Uniform, UniformLevels
from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.mixed import MixedColumns
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.packed.weight import PackedWeight
from posttrain.compress.solvers.gptq import feed_back, inverse_factor, prepared
from posttrain.compress.solvers.solver import LayerSolver, checked
from posttrain.trajectory import PosttrainError

POWER = 2.4  # of errors in the search of a range, as in GPTQ's
FLOOR = 1e-6  # of a probability
OneBit = Literal["abs", "centred"]


@dataclass(frozen=True)
class SliM(LayerSolver):
    r"""Salience-driven bits, then GPTQ whose groups each have their own.

    A weight's salience is δ = w² / U_jj², with U GPTQ's factor; a group's is the sum over its columns. The m most
    salient groups have bits + 1, the m least salient bits - 1; m is searched by the divergence of the layer's softmaxed
    outputs, `KL(rounded || float)`. Ranges are searched with errors of salient weights counted `salience` times.

    bits: N, the mean. group: columns that share bits and a scale. damping, block: as of GPTQ. moved: m; None searches
    it. salience: λ. reach, steps: ranges are p times the whole one, p from 1 - reach to 1 + reach in `steps` a side (0:
    the whole range alone). outlier: the z-score of δ in a group above which a weight is salient. one_bit: the scale of
    one-bit groups, `abs` for mean |w| or `centred` for mean |w - μ|. tokens: kept for the search of m.

    Reference: SliM-LLM, 2024, arXiv 2405.14917 (card 148).
    """

    bits: int = 2
    group: int = 128
    damping: float = 0.01
    block: int = 128
    moved: int | None = None
    salience: float = 1.0
    reach: float = 0.1
    steps: int = 50
    outlier: float = 2.0
    one_bit: OneBit = "abs"
    tokens: int = 512

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 7:
            raise PosttrainError(f"bits is {self.bits}; SliM-LLM moves groups to one bit less or more: expected 2 to 7")
        if self.one_bit not in ("abs", "centred"):
            raise PosttrainError(f"one_bit is {self.one_bit!r}; expected abs or centred")

    @property
    def keep(self) -> int:
        return self.tokens if self.moved is None else 0

    def check(self, shape: tuple[int, int], name: str) -> None:
        Uniform(self.bits, self.group).width(shape[1], name)

    def solve(self, weight: Tensor, moments: InputMoments | None, bits: float | None, name: str) -> PackedWeight:
        return self._solve(weight, None, moments, bits, name)

    def solve_linear(
        self, linear: nn.Linear, moments: InputMoments | None, bits: float | None, name: str
    ) -> PackedWeight:
        bias = None if linear.bias is None else linear.bias.detach().float()
        return self._solve(checked(linear.weight.detach().float(), name), bias, moments, bits, name)

    def _solve(
        self, weight: Tensor, bias: Tensor | None, moments: InputMoments | None, bits: float | None, name: str
    ) -> PackedWeight:
        assert moments is not None
        width = self.width(weight, name)
        plan = self.planned(weight, bias, moments, self.bits if bits is None else bits, name)
        weight, hessian = prepared(weight, moments, name)
        return self.rounded(weight, inverse_factor(hessian, self.damping, name), plan, width)

    def planned(self, weight: Tensor, bias: Tensor | None, moments: InputMoments, bits: float, name: str) -> list[int]:
        """The bits of each group of a layer. weight: `[out, in]` fp32; bias: `[out]`; bits: their mean."""
        width, mean = self.width(weight, name), round(bits)
        alive, hessian = prepared(weight, moments, name)
        salience = group_salience(alive, inverse_factor(hessian, self.damping, name).diag(), width)
        moved = self.moved
        if moved is None:
            moved = searched(weight, bias, moments.kept, salience, mean, width, self.one_bit)
        return group_bits(salience, mean, moved)

    def width(self, weight: Tensor, name: str) -> int:
        return Uniform(self.bits, self.group).width(weight.shape[1], name)

    def rounded(self, weight: Tensor, factor: Tensor, plan: Sequence[int], width: int) -> PackedWeight:
        """GPTQ with a number of bits for each group."""
        levels: list[UniformLevels] = []
        codes = torch.zeros(weight.shape, dtype=torch.int64)
        diagonal = factor.diag()

        def round_column(column: int, now: Tensor, whole: Tensor) -> Tensor:
            if column % width == 0:
                columns = slice(column, column + width)
                salient = salient_weights(whole[:, columns], diagonal[columns], self.outlier)
                grid = SalientRange(plan[column // width], width, self.salience, self.reach, self.steps, self.one_bit)
                levels.append(grid.fit(whole[:, columns], salient))
            level = levels[column // width]
            codes[:, column] = level.nearest(now)[:, 0]
            return level.values(codes[:, column : column + 1])

        feed_back(weight, factor, round_column, self.block, width if width < weight.shape[1] else 0)
        scale, zero = torch.cat([x.scale for x in levels], 1), torch.cat([x.zero for x in levels], 1)
        return packed_groups(codes, scale, zero, plan)


@dataclass(frozen=True)
class SalientRange(Grid):
    """Integer zero points, with a range searched around the whole one; one bit is the sign around the mean.

    salience: how often the error of a salient weight counts. reach, steps, one_bit: see `SliM`.
    """

    salience: float = 1.0
    reach: float = 0.1
    steps: int = 50
    one_bit: OneBit = "abs"

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> UniformLevels:
        """importance: bool, where weights are salient."""
        if self.bits == 1:
            return sign_levels(weight, self.one_bit)
        ends = torch.cat([weight.amin(1, keepdim=True).clamp(max=0), weight.amax(1, keepdim=True).clamp(min=0)], 1)
        counts = 1.0 if importance is None else 1 + (self.salience - 1) * importance.float()
        whole = Uniform(self.bits, 0)
        best = whole.fit(ends)
        least = self._error(best, weight, counts)
        for step in range(1, self.steps + 1):
            for sign in (1, -1):
                tried = whole.fit(ends * (1 + sign * self.reach * step / self.steps))
                error = self._error(tried, weight, counts)
                better = error < least
                least = torch.where(better, error, least)
                best = UniformLevels(
                    torch.where(better, tried.scale, best.scale), torch.where(better, tried.zero, best.zero), best.top
                )
        return best

    def _error(self, levels: UniformLevels, weight: Tensor, counts: Tensor | float) -> Tensor:
        return ((levels.rounded(weight) - weight).abs() ** POWER * counts).sum(1, keepdim=True)

    def pack(self, codes: Tensor, levels: Sequence[object], group_of: Tensor | None = None) -> PackedWeight:
        found = [each for each in levels if isinstance(each, UniformLevels)]
        scale, zero = torch.cat([f.scale for f in found], 1), torch.cat([f.zero for f in found], 1)
        return packed_groups(codes, scale, zero, [self.bits] * len(found))


def sign_levels(weight: Tensor, one_bit: OneBit = "abs") -> UniformLevels:
    """One bit, `a sign(w - μ) + μ` a row: the values μ - a and μ + a, with a the mean of |w| or of |w - μ|."""
    mean = weight.mean(1, keepdim=True)
    size = (weight if one_bit == "abs" else weight - mean).abs().mean(1, keepdim=True)
    scale = (2 * size).clamp(max=65504.0).half().float()
    return UniformLevels(torch.where(scale > 0, scale, 1.0), (mean - size).half().float(), 1, float_zero=True)


def group_salience(weight: Tensor, diagonal: Tensor, width: int) -> Tensor:
    """`[groups]`: the salience w² / U_jj² summed over the rows and columns of each. diagonal: `[in]` U_jj."""
    return (weight / diagonal).square().sum(0).view(-1, width).sum(1)


def salient_weights(weight: Tensor, diagonal: Tensor, outlier: float = 2.0) -> Tensor:
    """`[out, n]` bool: weights of a group as salient as the least of those whose salience lies more than `outlier`
    standard deviations from the group's mean; none where there are no such.
    """
    delta = (weight / diagonal).square()
    far = ((delta - delta.mean()) / delta.std().clamp(min=1e-30)).abs() > outlier
    if not far.any():
        return far
    return delta >= delta[far].min()


def group_bits(salience: Tensor, bits: int, moved: int) -> list[int]:
    """Each group's bits: `bits` + 1 for the `moved` most salient, - 1 for as many of the least salient."""
    order = torch.argsort(salience, descending=True, stable=True)
    if 2 * moved > len(order):
        raise PosttrainError(f"{moved} groups up and {moved} down are more than the {len(order)} groups of a layer")
    found = torch.full((len(order),), bits)
    if moved:
        found[order[:moved]] += 1
        found[order[-moved:]] -= 1
    return [int(b) for b in found]


def packed_groups(codes: Tensor, scale: Tensor, zero: Tensor, plan: Sequence[int]) -> PackedWeight:
    """`[out, in]` codes of groups with bits of their own. scale, zero: `[out, groups]`; of one bit a group has
    the smaller of its two values in the place of a zero point.
    """
    bits, width = torch.tensor(list(plan)), codes.shape[1] // len(plan)
    parts, part_of = [], torch.zeros(codes.shape[1], dtype=torch.int64)
    for number, each in enumerate(sorted(set(plan))):
        groups = bits == each
        columns = groups.repeat_interleave(width)
        kind: Literal["float", "integer"] = "float" if each == 1 else "integer"
        parts.append(UniformWeight.of(codes[:, columns], scale[:, groups], zero[:, groups], each, kind))
        part_of[columns] = number
    return MixedColumns.of(parts, part_of)


def divergences(
    weight: Tensor, bias: Tensor | None, inputs: Tensor, salience: Tensor, bits: int, width: int,
    one_bit: OneBit = "abs",
) -> list[float]:  # fmt: skip
    """The mean KL(rounded || float) of softmaxed outputs for m = 0, 1, ... moved groups, rounded to the nearest.

    inputs: `[tokens, in]`. Outputs are summed up group by group, so that one m more changes two groups alone.
    """

    def part(group: int, wanted: int) -> Tensor:
        columns = slice(group * width, (group + 1) * width)
        levels = SalientRange(wanted, width, steps=0, one_bit=one_bit).fit(weight[:, columns])
        return inputs[:, columns] @ levels.rounded(weight[:, columns]).T

    plain = inputs @ weight.T
    rounded = sum((part(g, bits) for g in range(len(salience))), torch.zeros_like(plain))
    shift = 0.0 if bias is None else bias
    truth = torch.softmax(plain + shift, -1).clamp(min=FLOOR).log()
    order = torch.argsort(salience, descending=True, stable=True).tolist()
    found = []
    for moved in range(max(1, len(order) // 2)):
        if moved:
            for group, wanted in ((order[moved - 1], bits + 1), (order[-moved], bits - 1)):
                rounded = rounded + part(group, wanted) - part(group, bits)
        share = torch.softmax(rounded + shift, -1).clamp(min=FLOOR)
        found.append(float((share * (share.log() - truth)).sum(-1).mean()))
    return found


def searched(
    weight: Tensor, bias: Tensor | None, inputs: Tensor, salience: Tensor, bits: int, width: int,
    one_bit: OneBit = "abs",
) -> int:  # fmt: skip
    """m: from 1 to half the groups less one, that of the least divergence; 0 where there are too few groups."""
    found = divergences(weight, bias, inputs, salience, bits, width, one_bit)
    return 1 + min(range(len(found) - 1), key=lambda i: found[1 + i]) if len(found) > 1 else 0
