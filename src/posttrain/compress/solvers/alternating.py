"""A row of weights on a uniform grid as one least-squares problem: the best floats for codes, and codes for floats."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

STEPS, SPAN = 200, 160  # of the search of a smaller range: p = 1 - i/200, i < 160
SOLVED_AT_ONCE = 1 << 25  # numbers of the systems that are solved together


@dataclass(frozen=True)
class Grouped:
    """codes: `[out, in]`; scale, zero: `[out, groups]`, as half precision holds them; error: `[out]`; all fp64."""

    codes: Tensor
    scale: Tensor
    zero: Tensor
    error: Tensor

    def better(self, other: Grouped) -> tuple[Grouped, float]:
        """Row by row, codes and floats together, whichever errs less; and the share of rows that took the other's."""
        take = other.error < self.error
        row = take[:, None]
        return Grouped(
            torch.where(row, other.codes, self.codes),
            torch.where(row, other.scale, self.scale),
            torch.where(row, other.zero, self.zero),
            torch.where(take, other.error, self.error),
        ), float(take.double().mean())


@dataclass(frozen=True)
class Problem:
    """min (ŵ - w) H (ŵ - w)^T for each row, `ŵ = s q + z` by group.

    weight: `[out, in]` fp64. hessian: `[in, in]` fp64. groups: runs of columns. top: the highest code, from 0.
    symmetric: z is -s (top + 1)/2.
    """

    weight: Tensor
    hessian: Tensor
    groups: int
    top: int
    symmetric: bool = False

    @property
    def middle(self) -> int:
        return (self.top + 1) // 2

    def by_group(self, values: Tensor) -> Tensor:
        return values.view(len(values), self.groups, -1)

    def spread(self, values: Tensor) -> Tensor:
        """`[out, groups]` -> `[out, in]`."""
        return values.repeat_interleave(self.weight.shape[1] // self.groups, 1)

    def error(self, values: Tensor) -> Tensor:
        """`[out]` of `[out, in]` values."""
        gap = values - self.weight
        return ((gap @ self.hessian) * gap).sum(1)

    def held(self, scale: Tensor, zero: Tensor) -> tuple[Tensor, Tensor]:
        """Floats as they are stored."""
        scale = scale.clamp(-65504.0, 65504.0).half().double()
        return scale, -scale * self.middle if self.symmetric else zero.clamp(-65504.0, 65504.0).half().double()

    def grouped(self, codes: Tensor, scale: Tensor, zero: Tensor) -> Grouped:
        scale, zero = self.held(scale, zero)
        return Grouped(codes, scale, zero, self.error(codes * self.spread(scale) + self.spread(zero)))

    def nearest(self, scale: Tensor, zero: Tensor) -> Grouped:
        """Codes rounded to the nearest."""
        scale, zero = self.held(scale, zero)
        return self.grouped(half_up(self.weight, self.spread(scale), self.spread(zero), self.top), scale, zero)

    def whole_range(self, share: float = 1.0) -> tuple[Tensor, Tensor]:
        """Scale and zero of a share of each group's range, which holds 0; a group of zeros has scale 1."""
        rows = self.by_group(self.weight)
        low, high = rows.amin(2).clamp(max=0) * share, rows.amax(2).clamp(min=0) * share
        scale = 2 * torch.maximum(-low, high) / self.top if self.symmetric else (high - low) / self.top
        return torch.where(scale > 0, scale, 1.0), low


def half_up(weight: Tensor, scale: Tensor, zero: Tensor, top: int) -> Tensor:
    """The nearest codes, halves upwards; scales may be negative. Where one is 0 all codes are the same value."""
    return torch.floor((weight - zero) / torch.where(scale == 0, 1.0, scale) + 0.5).clamp_(0, top)


def fitted_floats(problem: Problem, codes: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and zero, `[out, groups]` fp64, that err least with these codes, before they are rounded to be stored.

    With A and J of `[in, groups]` the codes and ones of each group, `[A J]^T H [A J] (s, z) = [A J]^T H w`.
    """
    weight, hessian, groups = problem.weight, problem.hessian, problem.groups
    rows, columns = weight.shape
    width = columns // groups
    codes = codes - problem.middle if problem.symmetric else codes
    sums = hessian.view(columns, groups, width).sum(2)  # H J
    pulled = weight @ hessian
    codes_codes = torch.empty(rows, groups, groups, dtype=torch.float64)
    codes_ones = torch.empty(rows, groups, groups, dtype=torch.float64)
    for group in range(groups):
        mine = slice(group * width, (group + 1) * width)
        codes_codes[:, group] = problem.by_group((codes[:, mine] @ hessian[mine]) * codes).sum(2)
        codes_ones[:, group] = codes[:, mine] @ sums[mine]
    right = problem.by_group(codes * pulled).sum(2)
    if problem.symmetric:
        scale = _solved(codes_codes, right)
        return scale, -scale * problem.middle
    ones_ones = sums.view(groups, width, groups).sum(1).expand(rows, groups, groups)
    left = torch.cat([torch.cat([codes_codes, codes_ones], 2), torch.cat([codes_ones.mT, ones_ones], 2)], 1)
    found = _solved(left, torch.cat([right, problem.by_group(pulled).sum(2)], 1))
    return found[:, :groups], found[:, groups:]


def _solved(left: Tensor, right: Tensor) -> Tensor:
    """`[rows, n]` solutions of symmetric systems; to a singular one 0.01 of its mean diagonal is added."""
    left = (left + left.mT) / 2
    eye = torch.eye(left.shape[1], dtype=left.dtype)
    found = []
    chunk = max(1, SOLVED_AT_ONCE // left[0].numel())
    for a, b in zip(left.split(chunk), right.split(chunk), strict=True):
        solution, failed = torch.linalg.solve_ex(a, b)
        wrong = (failed != 0) | ~torch.isfinite(solution).all(1)
        if wrong.any():
            mean = a[wrong].diagonal(dim1=1, dim2=2).mean(1).clamp(min=1e-30)
            solution[wrong] = torch.linalg.solve(a[wrong] + 0.01 * mean[:, None, None] * eye, b[wrong])
        found.append(solution)
    return torch.cat(found)


def shrunk(problem: Problem) -> Grouped:
    """Each row's best share p of its range, by the error with codes rounded to the nearest. Searched in fp32."""
    single = Problem(problem.weight.float(), problem.hessian.float(), problem.groups, problem.top, problem.symmetric)
    best = torch.ones(len(problem.weight), dtype=torch.float64)
    least = torch.full((len(problem.weight),), torch.inf)
    for step in range(SPAN):
        share = 1 - step / STEPS
        scale, zero = problem.held(*problem.whole_range(share))
        s, z = single.spread(scale.float()), single.spread(zero.float())
        error = single.error(half_up(single.weight, s, z, problem.top) * s + z)
        best = torch.where(error < least, share, best)
        least = torch.minimum(error, least)
    scale, zero = problem.whole_range()
    return problem.nearest(scale * best[:, None], zero * best[:, None])


def descended(problem: Problem, start: Grouped, first: int, each: int) -> Tensor:
    """Codes on the grids of `start` by projected descent: `first` steps of Adam on the weights inside their range, then
    column by column the column is rounded and frozen, and the rest takes `each` steps more.
    """
    scale, zero = problem.spread(start.scale), problem.spread(start.zero)
    ends = torch.stack([zero, scale * problem.top + zero])
    low, high = ends.amin(0), ends.amax(0)
    now = problem.weight.clone()
    codes = torch.zeros_like(now)
    mean, square, count = torch.zeros_like(now), torch.zeros_like(now), 0

    def step(begin: int, small: float) -> None:
        nonlocal count
        count += 1
        rest = slice(begin, None)
        slope = (now - problem.weight) @ problem.hessian[:, rest]
        mean[:, rest].mul_(0.9).add_(slope, alpha=0.1)
        square[:, rest].mul_(0.999).addcmul_(slope, slope, value=0.001)
        size = (square[:, rest] / (1 - 0.999**count)).sqrt_().add_(small)
        now[:, rest] -= 1e-3 * mean[:, rest] / (1 - 0.9**count) / size
        now[:, rest] = torch.minimum(torch.maximum(now[:, rest], low[:, rest]), high[:, rest])

    for _ in range(first):
        step(0, 1e-5)
    for column in range(now.shape[1]):
        here = slice(column, column + 1)
        codes[:, here] = half_up(now[:, here], scale[:, here], zero[:, here], problem.top)
        now[:, here] = codes[:, here] * scale[:, here] + zero[:, here]
        if column + 1 < now.shape[1]:
            for _ in range(each):
                step(column + 1, 1e-4)
    return codes
