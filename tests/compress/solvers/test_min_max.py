"""The least largest violation: against brute force, in two problems that are no layers, and as a layer's rounding."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.solvers.dmmv import LeastLargestError
from posttrain.compress.solvers.gptq import GPTQ
from posttrain.compress.solvers.min_max import Problem, Search, least_violation, size
from posttrain.compress.solvers.rtn import RoundToNearest
from posttrain.trajectory import PosttrainError

pytestmark = pytest.mark.limit("dmmv")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def problem(variables: int, constraints: int, systems: int = 1, top: int = 1, seed: int = 0) -> tuple[Problem, Tensor]:
    """A problem and the residual of all codes 0."""
    matrix = drawn(constraints, variables, seed=seed)
    target = drawn(systems, constraints, seed=seed + 100) * math.sqrt(variables)
    return Problem(matrix, torch.ones(systems, variables, dtype=torch.float64), top), -target


def largest(made: Problem, start: Tensor, codes: Tensor) -> Tensor:
    return made.violations(start + (made.step * codes) @ made.matrix.T).amax(-1)


# -- the search --------------------------------------------------------------------------------------------------------


def test_brute_force_is_reached_in_most_and_never_beaten() -> None:
    reached, tried = 0, 20
    every = torch.tensor(list(itertools.product((0, 1), repeat=10)))
    for seed in range(tried):
        made, start = problem(10, 24, seed=seed)
        zero = torch.zeros(1, 10, dtype=torch.int64)
        found = largest(made, start, least_violation(made, start, zero, Search(200, 0, 16, 12, seed=seed)))
        best = (start + every.double() @ made.matrix.T).abs().amax(-1).min()
        assert float(found) >= float(best) - 1e-12
        reached += float(found) <= float(best) + 1e-9
    assert reached >= 15


@pytest.mark.parametrize("search", [Search(50), Search(50, 4, 0), Search(50, 8, 16, 3), Search(50, 0, 8, 0, 4.0)])
def test_it_never_gets_worse_and_more_moves_never_do(search: Search) -> None:
    made, start = problem(40, 60, 8, top=3)
    order = search.order
    codes = torch.randint(0, 4, (8, 40), generator=torch.Generator().manual_seed(0))
    residual = start + codes.double() @ made.matrix.T
    before = size(made.violations(residual), order)
    for moves in (0, 1, 3, 10, 50):
        longer = Search(moves, search.active, search.pairs, 0, order)
        found = least_violation(made, residual, codes, longer)
        after = size(made.violations(start + found.double() @ made.matrix.T), order)
        assert (after <= before + 1e-9).all()
        assert ((found >= 0) & (found <= 3)).all()
        before = after
    found = least_violation(made, residual, codes, search)
    assert (size(made.violations(start + found.double() @ made.matrix.T), order) < 0.8 * before.max()).any()


def test_no_move_is_no_change() -> None:
    made, start = problem(6, 8)
    codes = torch.zeros(1, 6, dtype=torch.int64)
    assert torch.equal(least_violation(made, start, codes, Search(moves=0)), codes)


def test_scaling_the_problem_scales_the_violation_and_keeps_the_codes() -> None:
    made, start = problem(20, 30, 4, top=3)
    codes = torch.ones(4, 20, dtype=torch.int64)
    residual = start + codes.double() @ made.matrix.T
    plain = least_violation(made, residual, codes)
    scaled = least_violation(Problem(made.matrix * 8, made.step, 3), residual * 8, codes)
    assert torch.equal(plain, scaled)


def test_a_norm_of_order_two_is_steepest_descent_on_the_squared_error() -> None:
    made, start = problem(12, 30, top=3, seed=4)
    codes = torch.ones(1, 12, dtype=torch.int64)
    residual = start + codes.double() @ made.matrix.T
    found = least_violation(made, residual, codes, Search(200, 0, 0, 0, 2.0))
    now = codes.clone()
    while True:
        options = []
        for column in range(12):
            for sign in (-1, 1):
                if 0 <= int(now[0, column]) + sign <= 3:
                    moved = now.clone()
                    moved[0, column] += sign
                    options.append((float(((start + moved.double() @ made.matrix.T) ** 2).sum()), moved))
        best = min(options, key=lambda o: o[0])
        if best[0] >= float(((start + now.double() @ made.matrix.T) ** 2).sum()) * (1 - 1e-9):
            break
        now = best[1]
    assert torch.equal(found, now)


def test_systems_do_not_know_of_each_other() -> None:
    made, start = problem(20, 30, 5, top=3)
    codes = torch.ones(5, 20, dtype=torch.int64)
    residual = start + codes.double() @ made.matrix.T
    together = least_violation(made, residual, codes)
    for row in range(5):
        part = slice(row, row + 1)
        alone = least_violation(Problem(made.matrix, made.step[part], 3), residual[part], codes[part])
        assert torch.equal(alone, together[part])


def test_weights_and_one_sided_constraints_by_hand() -> None:
    residual = torch.tensor([[-3.0, 2.0, 1.0]])
    made = Problem(torch.eye(3), torch.ones(1, 3), 1, torch.tensor([1.0, 1.0, 4.0]), torch.tensor([True, False, False]))
    assert made.violations(residual).tolist() == [[0.0, 2.0, 4.0]]
    assert made.violations(residual[:, [2, 1]], torch.tensor([[2, 1]])).tolist() == [[4.0, 2.0]]
    assert size(torch.tensor([[3.0, 4.0]]), 2.0).tolist() == [5.0]
    assert size(torch.tensor([[3e30, 4e30]]), 16.0).isfinite().all()


def test_a_variable_without_a_step_stays() -> None:
    made, start = problem(10, 20, top=3)
    made.step[:, 4] = 0.0
    codes = torch.full((1, 10), 2)
    found = least_violation(made, start + (made.step * codes) @ made.matrix.T, codes, Search(100, 0, 16, 5))
    assert found[0, 4] == 2


def test_a_plateau_is_crossed_by_the_tie_rule() -> None:
    # two equal largest violations, each of which a move of its own lowers: no single move lowers the largest
    made = Problem(torch.eye(2, dtype=torch.float64), torch.ones(1, 2, dtype=torch.float64), 4)
    start = torch.tensor([[-4.0, -4.0]], dtype=torch.float64)
    found = least_violation(made, start, torch.zeros(1, 2, dtype=torch.int64), Search(pairs=0))
    assert found.tolist() == [[4, 4]]


# -- no layers: a filter, an image -------------------------------------------------------------------------------------


def test_a_low_pass_filter_of_six_bits_ripples_less_than_when_its_taps_are_rounded() -> None:
    taps, half = 31, 15
    frequency = torch.linspace(0, 0.5, 217, dtype=torch.float64)
    frequency = frequency[(frequency <= 0.1) | (frequency >= 0.14)]
    order = torch.arange(half + 1, dtype=torch.float64)
    matrix = 2 * torch.cos(2 * math.pi * frequency[:, None] * order)
    matrix[:, 0] = 1.0
    wanted = (frequency <= 0.12).double()
    ideal = torch.linalg.lstsq(matrix, wanted[:, None]).solution[:, 0]
    step = float(ideal.abs().max()) / 31
    codes = torch.round(ideal / step).clamp(-32, 31).long() + 32
    steps = torch.full((1, half + 1), step, dtype=torch.float64)
    residual = (matrix @ (step * (codes.double() - 32)) - wanted)[None]
    made = Problem(matrix, steps, 63)
    found = least_violation(made, residual, codes[None], Search(400, 0, 24, 30))
    ripple = (matrix @ (step * (found[0].double() - 32)) - wanted).abs().max()
    assert (taps, len(frequency)) == (2 * half + 1, 200)
    assert float(ripple) <= 0.7 * float(residual.abs().max())


def test_an_image_from_few_projections_with_bounded_noise() -> None:
    side = 16
    draw = torch.Generator().manual_seed(1)
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    image = (((x - 6.0) ** 2 + (y - 8.0) ** 2 < 20) | ((x - 12) ** 2 + (y - 4) ** 2 < 6)).double()
    lines = [x.flatten(), y.flatten(), (x + y).flatten(), (x - y + side - 1).flatten()]
    matrix = torch.cat([torch.nn.functional.one_hot(line).T.double() for line in lines])
    measured = matrix @ image.flatten() + (torch.rand(len(matrix), generator=draw, dtype=torch.float64) - 0.5)
    relaxed = torch.linalg.lstsq(matrix, measured[:, None], driver="gelsd").solution[:, 0]
    codes = relaxed.round().clamp(0, 1).long()[None]
    residual = codes.double() @ matrix.T - measured
    made = Problem(matrix, torch.ones(1, side * side, dtype=torch.float64), 1)
    found = least_violation(made, residual, codes, Search(600, 0, 24, 10))
    wrong = [int((c[0] != image.flatten().long()).sum()) for c in (codes, found)]
    assert wrong[1] < wrong[0]


# -- layers ------------------------------------------------------------------------------------------------------------


def layer() -> tuple[Tensor, Tensor, Tensor]:
    """`[8, 64]` weights, 256 correlated tokens of which 192 are calibrated on."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(320, 16, generator=draw) @ torch.randn(16, 64, generator=draw) / 4
    x = x + 0.3 * torch.randn(320, 64, generator=draw)
    return torch.randn(8, 64, generator=draw) / 8, x[:256], x[256:]


def met(x: Tensor) -> InputMoments:
    found = InputMoments(x.shape[1], keep=512)
    found.add(x)
    return found


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("first", "least"), [(RoundToNearest, 0.75), (GPTQ, 0.95)])
def test_the_largest_error_falls_as_on_the_card(bits: int, first: type, least: float) -> None:
    weight, x, unseen = layer()
    start = first(Uniform(bits, 0))
    solver = LeastLargestError(start, 256, "none", Search(256))
    one, other = (s.solve(weight, met(x), None, "w") for s in (start, solver))
    errors = [((held.dequantize() - weight) @ x.T).abs() for held in (one, other)]
    rows = [e.amax(1) for e in errors]
    assert (rows[1] <= rows[0] + 1e-6).all()
    assert float(errors[1].max()) <= least * float(errors[0].max())
    squared = [float((e**2).sum()) for e in errors]
    assert squared[1] < 1.25 * squared[0]
    held_out = [((held.dequantize() - weight) @ unseen.T).abs().amax(1).mean() for held in (one, other)]
    assert held_out[1] < held_out[0] * 1.02
    assert isinstance(other, UniformWeight)
    assert isinstance(one, UniformWeight)
    assert torch.equal(one.scale, other.scale)
    assert other.counted_bits == one.counted_bits


def test_no_moves_leave_the_first_solution() -> None:
    weight, x, _ = layer()
    for grid in (Uniform(3, 16), Uniform(3, 16, "float"), Uniform(4, 0, "none")):
        start = GPTQ(grid, act_order=True)
        solver = LeastLargestError(start, search=Search(moves=0))
        one, other = (s.solve(weight, met(x), None, "w").dequantize() for s in (start, solver))
        assert torch.equal(one, other)


def test_weighting_by_size_asks_nothing_of_a_token_that_is_zero_and_less_of_a_large_one() -> None:
    weight, x, _ = layer()
    x = torch.cat([x, 50 * x[:1], torch.zeros(1, 64)])
    start = RoundToNearest(Uniform(3, 0))
    plain, weighed = (LeastLargestError(start, 512, w).solve(weight, met(x), None, "w") for w in ("none", "norm"))
    share = [((h.dequantize() - weight) @ x[:256].T).abs().amax(1).mean() for h in (plain, weighed)]
    assert share[1] < share[0]


def test_what_there_is_not() -> None:
    with pytest.raises(PosttrainError, match="expected none or norm"):
        LeastLargestError(weighting="size")  # type: ignore[arg-type]
    with pytest.raises(PosttrainError, match="expected at least 1"):
        LeastLargestError(tokens=0)
    from posttrain.compress.grids.table import Table

    weight, x, _ = layer()
    with pytest.raises(PosttrainError, match="RoundToNearest gave table codes; expected uniform"):
        LeastLargestError(RoundToNearest(Table())).solve(weight, met(x), None, "w")
