"""decoupleQ: closed forms by hand and by autograd, rows that never get worse, GPTQ in its first round."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from layer import correlated, loss, moments_of, white
from torch import Tensor

from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.method import Compression
from posttrain.compress.packed.linear import PackedLinear
from posttrain.compress.pipeline import compress_model
from posttrain.compress.solvers.alternating import Problem, descended, fitted_floats, half_up, shrunk
from posttrain.compress.solvers.decoupleq import DecoupleQ, Rounder, alternated, norm_parameters
from posttrain.compress.solvers.gptq import GPTQ
from posttrain.compress.solvers.rtn import RoundToNearest
from posttrain.compress.stacks import stacks
from posttrain.compress.walk import Block, Walk
from posttrain.trajectory import PosttrainError
from tiny_models import make_policy, random_tokens

LAYER = DecoupleQ(2, epochs=0)


def problem(rows: int = 12, columns: int = 24, groups: int = 1, bits: int = 2, symmetric: bool = False) -> Problem:
    weight, moments = correlated(rows, columns)
    hessian = moments.hessian.double()
    hessian += 0.01 * hessian.diag().mean() * torch.eye(columns, dtype=torch.float64)
    return Problem(weight.double(), hessian, groups, 2**bits - 1, symmetric)


def codes_of(given: Problem, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, given.top + 1, given.weight.shape, generator=draw).double()


def solved(solver: DecoupleQ, weight: Tensor, moments: Any) -> Tensor:
    return solver.solve(weight, moments, None, "w").dequantize()


# -- the closed form -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("symmetric", [False, True])
def test_where_the_floats_are_best_the_error_has_no_slope(groups: int, symmetric: bool) -> None:
    given = problem(groups=groups, symmetric=symmetric)
    codes = codes_of(given)
    scale, zero = (x.requires_grad_(True) for x in fitted_floats(given, codes))
    free = -scale * given.middle if symmetric else zero
    errors = given.error(codes * given.spread(scale) + given.spread(free))
    slopes = torch.autograd.grad(errors.sum(), [scale] if symmetric else [scale, zero])
    assert max(float(s.abs().max()) for s in slopes) < 1e-8


def test_the_floats_of_one_row_by_hand() -> None:
    # H = I: least squares of w = (1, 2, 4) on q = (0, 1, 3): s = 1, z = 1
    given = Problem(torch.tensor([[1.0, 2.0, 4.0]]).double(), torch.eye(3).double(), 1, 3)
    scale, zero = fitted_floats(given, torch.tensor([[0.0, 1.0, 3.0]]).double())
    assert (float(scale), float(zero)) == pytest.approx((1.0, 1.0))


def test_weights_on_a_grid_are_found_again_from_their_codes() -> None:
    given = problem(groups=2)
    codes = codes_of(given)
    scale = torch.rand(12, 2, generator=torch.Generator().manual_seed(1)).double() + 0.1
    on_grid = replace(given, weight=codes * given.spread(scale) - given.spread(0.7 * scale))
    found, zero = fitted_floats(on_grid, codes)
    torch.testing.assert_close(found, scale)
    torch.testing.assert_close(zero, -0.7 * scale)


def test_codes_that_are_all_the_same_are_no_failure() -> None:
    given = problem()
    codes = torch.ones(12, 24, dtype=torch.float64)  # scale and zero cannot be told apart
    found = given.grouped(codes, *fitted_floats(given, codes))
    assert torch.isfinite(found.error).all()


def test_halves_are_rounded_up_and_scales_may_be_negative() -> None:
    weight = torch.tensor([0.5, 1.5, -9.0, 9.0])
    assert half_up(weight, torch.tensor(1.0), torch.tensor(0.0), 3).tolist() == [1, 2, 0, 3]
    assert half_up(weight, torch.tensor(-1.0), torch.tensor(2.0), 3).tolist() == [2, 1, 3, 0]
    assert half_up(weight, torch.tensor(0.0), torch.tensor(2.0), 3).isfinite().all()


def test_on_white_inputs_it_is_least_squares_row_by_row() -> None:
    # alternating nearest codes and regression, written independently
    weight = correlated(6, 20)[0].double()
    given = Problem(weight, torch.eye(20).double(), 1, 3)
    rounder = Rounder(weight.float(), torch.eye(20), 0.0, "w")
    best = given.nearest(*given.whole_range())
    for _ in range(3):
        codes = rounder.codes(best, 3)
        for row in range(6):
            s, z = best.scale[row], best.zero[row]
            assert torch.equal(codes[row], ((weight[row] - z) / s + 0.5).floor().clamp(0, 3))
            design = torch.stack([codes[row], torch.ones(20).double()], 1)
            wanted = torch.linalg.lstsq(design, weight[row][:, None]).solution[:, 0]
            scale, zero = fitted_floats(given, codes)
            torch.testing.assert_close(torch.stack([scale[row, 0], zero[row, 0]]), wanted)
        best, _ = best.better(given.grouped(codes, *fitted_floats(given, codes)))


# -- the rounds ------------------------------------------------------------------------------------------------------


@pytest.mark.limit("decoupleq")
@pytest.mark.parametrize("group", [0, 16])
def test_one_round_is_gptq_where_it_errs_less_than_the_nearest_codes(group: int) -> None:
    weight, moments = correlated(24, 32)
    grid = Uniform(3, group, zero="float")  # every group holds weights of both signs, so its range holds 0
    # the damping is applied twice: to H, and to the damped H once more
    twice = GPTQ(grid, damping=0.01 + 0.01 * 1.01, act_order=True).solve(weight, moments, None, "w").dequantize()
    nearest = RoundToNearest(grid).solve(weight, None, None, "w").dequantize()
    hessian = moments.hessian.double()
    hessian += 0.01 * hessian.diag().mean() * torch.eye(32, dtype=torch.float64)

    def error(values: Tensor) -> Tensor:
        gap = values.double() - weight.double()
        return ((gap @ hessian) * gap).sum(1)

    wanted = torch.where((error(twice) < error(nearest))[:, None], twice, nearest)
    found = solved(replace(LAYER, bits=3, group=group, rounds=1), weight, moments)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_no_row_ever_gets_worse() -> None:
    given = problem(rows=40, groups=2)
    rounder = Rounder(given.weight.float(), given.hessian.float(), 0.01, "w")
    errors = [alternated(given, rounds, rounder).error for rounds in (1, 2, 3, 4)]
    for before, after in pairwise(errors):
        assert (after <= before).all()
    assert float(errors[-1].sum()) < 0.8 * float(errors[0].sum())


def test_what_is_stored_errs_as_was_accepted() -> None:
    weight, moments = correlated(24, 32)
    given = problem(24, 32, groups=4)
    rounder = Rounder(given.weight.float(), given.hessian.float(), 0.01, "w")
    best = alternated(given, 4, rounder)
    stored = solved(replace(LAYER, group=8), weight, moments)
    torch.testing.assert_close(given.error(stored.double()), best.error, rtol=1e-4, atol=1e-9)


def test_the_search_of_a_smaller_range_is_no_worse_than_the_whole_one() -> None:
    given = problem(rows=40, groups=3)
    assert (shrunk(given).error <= given.nearest(*given.whole_range()).error * (1 + 1e-5)).all()


def test_codes_are_in_the_columns_own_order() -> None:
    # one column alone has inputs: whatever the order of the columns, its weights must come out well
    weight = correlated(16, 8)[0]
    inputs = 0.01 * torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    inputs[:, 5] *= 1000
    found = solved(replace(LAYER, bits=4), weight, moments_of(inputs))
    assert float((found - weight)[:, 5].abs().max()) < 1e-4
    assert float((found - weight).abs().max()) > 1e-3


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.75), (3, 0.9), (4, 0.95)])
def test_it_errs_less_than_gptq(bits: int, gain: float) -> None:
    # card 022's own check: 64 x 128, a scale a row
    weight, moments = correlated(64, 128, rank=32)
    plain = GPTQ(Uniform(bits, 0, zero="float"), act_order=True).solve(weight, moments, None, "w").dequantize()
    one, four = (solved(replace(LAYER, bits=bits, rounds=k), weight, moments) for k in (2, 4))
    errors = [loss(weight, found, moments) for found in (plain, one, four)]
    assert errors[2] <= errors[1] < errors[0]
    assert errors[2] < gain * errors[0]


@pytest.mark.parametrize("symmetric", [False, True])
def test_descent_between_frozen_columns_errs_less_than_nearest_codes(symmetric: bool) -> None:
    given = problem(rows=12, columns=24, symmetric=symmetric)
    given = replace(given, weight=given.weight * 20)  # its learning rate suits weights of this size
    start = shrunk(given)
    codes = descended(given, start, 50, 5)
    assert set(codes.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0}
    assert float(given.grouped(codes, start.scale, start.zero).error.sum()) < 0.96 * float(start.error.sum())


def test_a_symmetric_grid_has_no_zero_point() -> None:
    weight, moments = correlated(16, 24)
    made = replace(LAYER, bits=3, symmetric=True).solve(weight, moments, None, "w")
    assert made.settings()["zero"] == "none"
    assert loss(weight, made.dequantize(), moments) < 0.05


def test_an_allocations_bits_are_heeded() -> None:
    weight, moments = correlated(16, 24)
    assert LAYER.solve(weight, moments, 4.0, "w").settings()["bits"] == 4


def test_rows_of_zeros_stay_zeros() -> None:
    weight, moments = correlated(8, 16)
    weight[2] = 0.0
    assert float(solved(LAYER, weight, moments)[2].abs().max()) == 0.0
    assert torch.isfinite(solved(LAYER, weight, white(16))).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"rounding": "up"}, "expected gptq or train"), ({"rounds": 0}, "rounds 0"), ({"bits": 0}, "bits is 0")],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PosttrainError, match=message):
        DecoupleQ(**arguments)


# -- the block's floats ----------------------------------------------------------------------------------------------


def first_block() -> Block:
    model = make_policy("llama", None, num_hidden_layers=1).base
    ids = random_tokens(8 * 16, torch.Generator().manual_seed(0)).view(8, 16)
    return next(iter(Walk(model, stacks(model)[0], [{"input_ids": ids, "use_cache": False}], keeps_float=True)))


def solved_block(solver: DecoupleQ) -> tuple[float, list[Tensor], list[Tensor]]:
    """The error of a block's outputs, its codes, and its norms."""
    block = first_block()
    wanted = block.outputs()[0]
    solver.solve_block(block)
    codes = [m.weight.codes for m in block.module.modules() if isinstance(m, PackedLinear)]
    return float((block.outputs()[0] - wanted).square().mean()), codes, norm_parameters(block.module)


@pytest.mark.parametrize("norms", [False, True])
def test_training_the_floats_brings_the_block_closer_and_leaves_the_codes(norms: bool) -> None:
    solver = DecoupleQ(2, 16, epochs=10, rate=1e-3, rows=2, norms=norms)
    before, codes, _ = solved_block(replace(solver, epochs=0))
    after, same, found = solved_block(solver)
    assert after < 0.9 * before
    assert all(torch.equal(a, b) for a, b in zip(codes, same, strict=True))
    plain = norm_parameters(first_block().module)
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True)) != norms


def test_zeros_stay_zeros_when_the_floats_are_trained() -> None:
    """A whole layer, and rows: all that makes them is a zero point, which training would move."""
    model = make_policy("llama", None, num_hidden_layers=1).base
    mlp, attention = model.model.layers[0].mlp, model.model.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.weight.zero_()
        mlp.up_proj.weight[:5] = 0.0
    ids = random_tokens(8 * 16, torch.Generator().manual_seed(0)).view(8, 16)
    made = Compression("decoupleq", DecoupleQ(2, 16, epochs=3, rate=1e-3, rows=2))
    summary = compress_model(model, made, [{"input_ids": ids, "use_cache": False}])
    assert not attention.q_proj.weight.dequantize().any()
    up = mlp.up_proj.weight.dequantize()
    assert not up[:5].any()
    assert up[5:].any(1).all()
    errors = {layer.name.rpartition(".")[2]: layer.error for layer in summary.layers}
    assert errors["q_proj"] == 0.0
    assert 0.1 < errors["up_proj"] < 1.0


def test_a_model_is_compressed_with_its_blocks_trained() -> None:
    model = make_policy("qwen2", None).base
    ids = random_tokens(6 * 12, torch.Generator().manual_seed(0)).view(6, 12)
    asked = {n: p.requires_grad for n, p in model.named_parameters()}
    made = Compression("decoupleq", DecoupleQ(3, 16, epochs=1))
    summary = compress_model(model, made, [{"input_ids": ids, "use_cache": False}])
    assert summary.bits == pytest.approx(3 + 32 / 16)
    assert all(p.requires_grad == asked[n] for n, p in model.named_parameters())
