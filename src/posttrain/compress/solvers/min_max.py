"""The least largest violation: integers such that no constraint of a linear system is violated much.

A local search for many systems that share their matrix at once. It knows nothing of models: rounding a layer, a filter
with few bits or an image from its projections are all its problems.

Source: Discrete Optimization of Min-Max Violation, 2025, arXiv 2508.13437 (card 131).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TIE = 32.0  # of equally large violations, the choice with the smaller norm of this order wins
KICKED = 3  # variables that a kick moves at least
REFRESH = 64  # rounds between computations of the residual anew
CHECKED = 4  # moves a round that are tried on all constraints
SAME = 1e-7  # violations that differ by less, as a share, are as large


@dataclass(frozen=True)
class Search:
    """How long and how far is searched.

    moves: accepted ones at most, a system. active: constraints with the largest violations that rank the moves (0:
    all); what is accepted was tried on all. pairs: single moves that are tried in pairs once none alone helps (0: no
    pairs). kicks: how often a system that is stuck is disturbed, in a hundredth of its variables, and searched again;
    the best is kept. order: of the norm that is made small, inf for the largest violation.
    """

    moves: int = 256
    active: int = 16
    pairs: int = 16
    kicks: int = 0
    order: float = math.inf
    seed: int = 0


@dataclass(frozen=True)
class Problem:
    """`min max_i weight_i |r_i|` over integer codes, with residuals r = A x - c and x = step * code.

    matrix: A, `[constraints, variables]`. step: `[systems, variables]`, 0 for a variable that stays. top: codes are 0
    to top. weights: `[constraints]`, positive. upper: `[constraints]` bool, those that only ask for r <= 0.
    """

    matrix: Tensor
    step: Tensor
    top: int
    weights: Tensor | None = None
    upper: Tensor | None = None

    def violations(self, residual: Tensor, rows: Tensor | None = None) -> Tensor:
        """Of `[..., constraints]` residuals. rows: which constraints these are, in a shape that broadcasts."""
        found = residual.abs()
        if self.upper is not None:
            found = torch.where(self.upper if rows is None else self.upper[rows], residual.clamp(min=0.0), found)
        if self.weights is None:
            return found
        return found * (self.weights if rows is None else self.weights[rows])

    def of(self, systems: Tensor) -> Problem:
        """Some of the systems."""
        return Problem(self.matrix, self.step[systems], self.top, self.weights, self.upper)


def least_violation(problem: Problem, residual: Tensor, codes: Tensor, search: Search | None = None) -> Tensor:
    """Better `[systems, variables]` codes than the given ones, never worse.

    residual: `[systems, constraints]` of the given codes.
    """
    return _Run(problem, residual, codes, search or Search()).codes()


def size(violations: Tensor, order: float, dim: int = -1) -> Tensor:
    """The norm of violations over a dimension, without overflow."""
    largest = violations.amax(dim, keepdim=True).clamp(min=1e-30)
    if math.isinf(order):
        return largest.squeeze(dim)
    return (largest * ((violations / largest) ** order).sum(dim, keepdim=True) ** (1 / order)).squeeze(dim)


class _Run:
    """One search: codes and residuals of all systems, of which some are still going."""

    def __init__(self, problem: Problem, residual: Tensor, codes: Tensor, search: Search) -> None:
        self.problem, self.search = problem, search
        self.by_variable = problem.matrix.T.contiguous()
        self.first, self.start = residual, codes
        self.residual, self.now = residual.clone(), codes.clone()
        self.best, self.least = codes.clone(), self._sizes(residual)
        self.moves = torch.zeros(len(codes), dtype=torch.int64)
        self.kicks = torch.full((len(codes),), search.kicks)
        self.draw = torch.Generator().manual_seed(search.seed)

    def codes(self) -> Tensor:
        going, rounds = self._still(torch.arange(len(self.now))), 0
        while len(going):
            moved = self._round(going, pairs=False)
            if self.search.pairs and not moved.all():
                moved[~moved] = self._round(going[~moved], pairs=True)
            self._remember(going)
            going = torch.cat([self._still(going[moved]), self._kicked(going[~moved])])
            rounds += 1
            if rounds % REFRESH == 0:
                self._refresh(going)
        return self.best

    def _sizes(self, residual: Tensor) -> Tensor:
        """`[..., 2]`: the norm, and what decides between equal ones."""
        found = self.problem.violations(residual)
        return torch.stack([size(found, self.search.order), size(found, TIE)], -1)

    def _round(self, going: Tensor, *, pairs: bool) -> Tensor:
        """Give each of these systems its best move, if one is better; `[going]` bool, which moved."""
        residual, now, problem = self.residual[going], self.now[going], self.problem.of(going)
        ranking = _Ranking(problem, residual, now, self.search)
        columns, signs = ranking.pairs(self.search.pairs) if pairs else ranking.singles(CHECKED)
        tried = columns.shape[1]
        change = signs * problem.step[:, None].expand(-1, tried, -1).gather(2, columns)
        moved = residual[:, None] + (change[..., None] * self.by_variable[columns]).sum(2)
        after = now[:, None].expand(-1, tried, -1).gather(2, columns) + signs
        better, rank = self._better(self._sizes(moved), self._sizes(residual)[:, None])
        better &= ((after >= 0) & (after <= problem.top)).all(-1)
        found, pick = better.any(1), rank.masked_fill(~better, torch.inf).argmin(1)
        each = torch.arange(len(going))[found]
        taken = pick[found]
        self.residual[going[found]] = moved[each, taken]
        self.now[going[found, None], columns[each, taken]] = after[each, taken]
        self.moves[going[found]] += 1
        return found

    def _better(self, after: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        """Which of `[systems, tried, 2]` sizes are better, and their rank: lower ones first, then by the tie's rule."""
        shares = after / before.clamp(min=1e-30)
        lower = shares[..., 0] < 1 - SAME
        tied = (shares[..., 0] <= 1 + SAME) & (shares[..., 1] < 1 - SAME)
        rank = torch.where(lower, shares[..., 0], 1 + shares[..., 1])
        return lower | tied if math.isinf(self.search.order) else lower, rank

    def _remember(self, going: Tensor) -> None:
        sizes = self._sizes(self.residual[going])
        least = self.least[going]
        better = (sizes[:, 0] < least[:, 0]) | ((sizes[:, 0] == least[:, 0]) & (sizes[:, 1] < least[:, 1]))
        self.best[going[better]] = self.now[going[better]]
        self.least[going[better]] = sizes[better]

    def _still(self, going: Tensor) -> Tensor:
        return going[self.moves[going] < self.search.moves]

    def _kicked(self, stuck: Tensor) -> Tensor:
        """Those of the stuck systems that may be disturbed once more, each from its best codes."""
        stuck = self._still(stuck[self.kicks[stuck] > 0])
        if not len(stuck):
            return stuck
        self.kicks[stuck] -= 1
        shape = (len(stuck), self.now.shape[1])
        chance = torch.rand(shape, generator=self.draw)
        share = min(shape[1], max(KICKED, round(0.01 * shape[1])))
        hit = chance <= chance.topk(share, dim=1, largest=False).values[:, -1:]
        sign = torch.randint(0, 2, shape, generator=self.draw) * 2 - 1
        disturbed = (self.best[stuck] + sign * hit).clamp(0, self.problem.top)
        self.now[stuck] = torch.where(self.problem.step[stuck] == 0, self.best[stuck], disturbed)
        self._refresh(stuck)
        return stuck

    def _refresh(self, going: Tensor) -> None:
        """The residuals of the present codes, without what updates have gathered."""
        change = self.problem.step[going] * (self.now[going] - self.start[going])
        self.residual[going] = self.first[going] + change @ self.problem.matrix.T


class _Ranking:
    """What each move makes of the largest violations, on the active constraints."""

    def __init__(self, problem: Problem, residual: Tensor, codes: Tensor, search: Search) -> None:
        self.problem, self.order = problem, search.order
        count = problem.matrix.shape[0]
        few = search.active if math.isinf(search.order) and 0 < search.active < count else count
        self.rows = problem.violations(residual).topk(few, dim=1).indices
        self.residual = residual.gather(1, self.rows)
        self.effect = problem.matrix[self.rows] * problem.step[:, None]  # [systems, active, variables]
        ups, downs = self._after(self.effect), self._after(-self.effect)
        ups = ups.masked_fill((codes >= problem.top) | (problem.step == 0), torch.inf)
        downs = downs.masked_fill((codes <= 0) | (problem.step == 0), torch.inf)
        self.by_move = torch.cat([ups, downs], 1)

    def _after(self, change: Tensor) -> Tensor:
        """`[systems, variables]`: the norm over the active constraints after a change of each variable."""
        found = self.problem.violations(self.residual[..., None] + change, self.rows[..., None])
        return size(found, self.order, 1)

    def singles(self, count: int) -> tuple[Tensor, Tensor]:
        """Columns and signs of the best moves, `[systems, count, 1]` each."""
        count = min(count, self.by_move.shape[1])
        return self._columns(self.by_move.topk(count, dim=1, largest=False).indices[..., None])

    def pairs(self, among: int) -> tuple[Tensor, Tensor]:
        """The same of the best pairs among the best moves: `[systems, count, 2]`."""
        among = min(among, self.by_move.shape[1])
        moves = self.by_move.topk(among, dim=1, largest=False).indices
        columns, signs = self._columns(moves)
        place = columns[..., None].expand(-1, -1, self.effect.shape[1])
        change = signs[..., None] * self.effect.transpose(1, 2).gather(1, place)
        left, right = torch.triu_indices(among, among, 1)
        both = self.residual[:, None] + change[:, left] + change[:, right]
        after = size(self.problem.violations(both, self.rows[:, None]), self.order)
        best = after.topk(min(CHECKED, after.shape[1]), dim=1, largest=False).indices
        return self._columns(torch.stack([moves.gather(1, left[best]), moves.gather(1, right[best])], -1))

    def _columns(self, moves: Tensor) -> tuple[Tensor, Tensor]:
        variables = self.problem.matrix.shape[1]
        return moves % variables, torch.where(moves < variables, 1, -1)
