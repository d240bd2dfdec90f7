"""SliM-LLM: GPTQ where nothing is moved, bits that keep their mean, salience by GPTQ's own factor, one bit by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from layer import correlated, loss, moments_of
from torch import Tensor, nn

from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.method import Compression
from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.mixed import MixedColumns
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.pipeline import compress_model
from posttrain.compress.solvers.gptq import GPTQ, inverse_factor, prepared
from posttrain.compress.solvers.omniquant import LearnedClipping
from posttrain.compress.solvers.slim import (
    SalientRange,
    SliM,
    divergences,
    group_bits,
    group_salience,
    packed_groups,
    salient_weights,
    searched,
    sign_levels,
)
from posttrain.compress.solvers.slim_plus import MixedClipping, MixedRanges, SignRange
from posttrain.trajectory import PosttrainError
from tiny_models import make_policy, random_tokens


def layer(rows: int = 24, columns: int = 64, seed: int = 0) -> tuple[Tensor, InputMoments]:
    """With inputs kept, for the search of how many groups are moved."""
    weight, _ = correlated(rows, columns, seed=seed)
    draw = torch.Generator().manual_seed(seed + 1)
    inputs = torch.randn(400, 12, generator=draw) @ torch.randn(12, columns, generator=draw)
    inputs = (inputs + torch.randn(400, columns, generator=draw)) * torch.randn(columns, generator=draw).exp()
    return weight, moments_of(inputs, keep=200)


def factor_of(weight: Tensor, moments: InputMoments) -> Tensor:
    return inverse_factor(prepared(weight, moments, "w")[1], 0.01, "w")


# -- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.limit("slim-llm")
@pytest.mark.parametrize("bits", [2, 3])
def test_with_no_group_moved_and_whole_ranges_it_is_gptq(bits: int) -> None:
    weight, moments = layer()
    plain = GPTQ(Uniform(bits, 16)).solve(weight, moments, None, "w")
    found = SliM(bits, 16, moved=0, steps=0).solve(weight, moments, None, "w")
    assert isinstance(found, UniformWeight)
    assert torch.equal(found.dequantize(), plain.dequantize())
    assert found.counted_bits == plain.counted_bits


@pytest.mark.parametrize("moved", [0, 1, 2, 3, 4])
@pytest.mark.parametrize("bits", [2, 3])
def test_the_mean_of_the_bits_stays(bits: int, moved: int) -> None:
    salience = torch.rand(8, generator=torch.Generator().manual_seed(0))
    found = group_bits(salience, bits, moved)
    assert sum(found) == 8 * bits
    assert sorted(found) == [bits - 1] * moved + [bits] * (8 - 2 * moved) + [bits + 1] * moved
    if moved:
        assert found[int(salience.argmax())] == bits + 1
        assert found[int(salience.argmin())] == bits - 1


def test_more_groups_than_there_are_cannot_be_moved() -> None:
    with pytest.raises(PosttrainError, match="3 groups up and 3 down are more than the 5"):
        group_bits(torch.rand(5), 2, 3)


def test_one_bit_by_hand() -> None:
    # card 148: w = (3, 1, -1, -3): mean 0, mean size 2
    weight = torch.tensor([[3.0, 1.0, -1.0, -3.0]])
    assert sign_levels(weight).rounded(weight).tolist() == [[2.0, 2.0, -2.0, -2.0]]
    # (4, 2, 0, 6): mean 3, mean |w| 3, mean |w - 3| 2
    weight = torch.tensor([[4.0, 2.0, 0.0, 6.0]])
    assert sign_levels(weight, "abs").rounded(weight).tolist() == [[6.0, 0.0, 0.0, 6.0]]
    assert sign_levels(weight, "centred").rounded(weight).tolist() == [[5.0, 1.0, 1.0, 5.0]]
    assert torch.isfinite(sign_levels(torch.zeros(2, 4)).rounded(torch.zeros(2, 4))).all()


def test_salience_weighted_once_is_the_plain_search() -> None:
    weight, salient = layer()[0], torch.rand(24, 64, generator=torch.Generator().manual_seed(0)) > 0.8
    grid = SalientRange(3, 64, salience=1.0)
    weighted, plain = grid.fit(weight, salient), grid.fit(weight)
    assert torch.equal(weighted.scale, plain.scale)
    assert torch.equal(weighted.zero, plain.zero)
    heavy = replace(grid, salience=30.0).fit(weight, salient)
    assert not torch.equal(heavy.scale, plain.scale)

    def lost(levels: Any) -> Tensor:
        return (((levels.rounded(weight) - weight).abs() ** 2.4) * salient).sum(1)

    assert float(lost(heavy).sum()) < float(lost(plain).sum())


def test_ranges_are_searched_a_tenth_to_either_side_and_hold_zero() -> None:
    weight = layer()[0]
    whole = Uniform(3, 0).fit(weight)
    found = SalientRange(3, 64).fit(weight)
    ratio = found.scale / whole.scale
    assert float(ratio.min()) >= 0.9 - 1e-2
    assert float(ratio.max()) <= 1.1 + 1e-2
    assert float((ratio - 1).abs().max()) > 0.01
    assert ((found.zero >= 0) & (found.zero <= 7)).all()


# -- salience --------------------------------------------------------------------------------------------------------


def test_salience_is_by_the_factors_diagonal() -> None:
    weight, moments = layer(4, 8)
    diagonal = factor_of(weight, moments).diag()
    found = group_salience(weight, diagonal, 4)
    delta = [[float(weight[r, c] ** 2 / diagonal[c] ** 2) for c in range(8)] for r in range(4)]
    by_hand = [sum(row[c] for row in delta for c in columns) for columns in (range(4), range(4, 8))]
    assert found.tolist() == pytest.approx(by_hand, rel=1e-4)
    by_inverse = group_salience(weight, torch.linalg.inv(moments.hessian).diag().sqrt(), 4)
    assert not torch.allclose(found, by_inverse, rtol=0.05)  # not the inverse's own diagonal


def test_a_group_with_loud_inputs_gets_a_bit_more() -> None:
    weight, _ = layer()
    inputs = torch.randn(400, 64, generator=torch.Generator().manual_seed(0))
    inputs[:, 32:48] *= 10
    moments = moments_of(inputs, keep=200)
    solver = SliM(2, 16)
    assert solver.planned(weight, None, moments, 2, "w")[2] == 3
    made = solver.solve(weight, moments, None, "w")
    plain = SliM(2, 16, moved=0).solve(weight, moments, None, "w")
    assert loss(weight, made.dequantize(), moments) < loss(weight, plain.dequantize(), moments)


def test_salient_weights_are_those_as_salient_as_the_least_outlier() -> None:
    weight = torch.ones(10, 10)
    weight[0, 0], weight[3, 4] = 10.0, 9.0
    found = salient_weights(weight, torch.ones(10))
    assert found.sum() == 2
    assert found[0, 0]
    assert found[3, 4]
    assert not salient_weights(torch.ones(10, 10), torch.ones(10)).any()  # no outlier: none is salient


# -- the search of how many are moved --------------------------------------------------------------------------------


def by_definition(weight: Tensor, bias: Tensor | None, inputs: Tensor, plan: list[int], width: int) -> float:
    rounded = torch.cat(
        [
            (Uniform(b, 0).fit(g) if b > 1 else sign_levels(g)).rounded(g)
            for b, g in zip(plan, weight.split(width, 1), strict=True)
        ],
        1,
    )
    shift = 0 if bias is None else bias
    p = torch.softmax(inputs @ rounded.T + shift, -1).clamp(min=1e-6)
    q = torch.softmax(inputs @ weight.T + shift, -1).clamp(min=1e-6)
    return float((p * (p.log() - q.log())).sum(-1).mean())


@pytest.mark.parametrize("with_bias", [False, True])
def test_divergences_are_those_of_the_whole_rounded_matrices(with_bias: bool) -> None:
    weight, moments = layer()
    weight = weight * 10
    bias = torch.randn(24, generator=torch.Generator().manual_seed(2)) if with_bias else None
    salience = group_salience(weight, factor_of(weight, moments).diag(), 8)
    found = divergences(weight, bias, moments.kept, salience, 2, 8)
    assert len(found) == 4  # of eight groups, none to three
    wanted = [by_definition(weight, bias, moments.kept, group_bits(salience, 2, m), 8) for m in range(4)]
    assert found == pytest.approx(wanted, rel=1e-4)
    assert searched(weight, bias, moments.kept, salience, 2, 8) == 1 + min(range(3), key=lambda i: wanted[1 + i])


def test_too_few_groups_have_none_to_move() -> None:
    weight, moments = layer(8, 48)
    salience = group_salience(weight, factor_of(weight, moments).diag(), 16)
    assert searched(weight, None, moments.kept, salience, 2, 16) == 0


def test_the_bias_of_a_layer_is_heeded() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(64, 24)
    seen: list[Any] = []

    class Watching(SliM):
        def planned(self, weight: Tensor, bias: Tensor | None, *rest: Any) -> list[int]:
            seen.append(bias)
            return super().planned(weight, bias, *rest)

    Watching(2, 16).solve_linear(linear, layer()[1], None, "w")
    assert torch.equal(seen[0], linear.bias)


# -- packing ---------------------------------------------------------------------------------------------------------


def test_groups_of_all_bits_are_stored_as_they_were_found() -> None:
    weight, moments = layer()
    solver = SliM(2, 8, moved=2)
    made = solver.solve(weight, moments, None, "w")
    assert isinstance(made, MixedColumns)
    assert made.counted_bits == pytest.approx(8 * made.stored_bytes, rel=0.03)
    plan = solver.planned(weight, None, moments, 2, "w")
    for group, (bits, values) in enumerate(zip(plan, made.dequantize().split(8, 1), strict=True)):
        assert max(len(row.unique()) for row in values) <= 2**bits, f"group {group}"
    # codes of 2 bits on average; scales and zeros of 16 and b bits, of one bit 16 and 16; the map of columns
    assert made.counted_bits == 24 * (64 * 2 + 8 * 16 + 2 * 3 + 4 * 2 + 2 * 16) + 64 * 2


def test_packed_groups_are_what_codes_stand_for() -> None:
    codes = torch.tensor([[1, 0, 3, 2, 7, 5]])
    scale, zero = torch.tensor([[0.5, 1.0, 2.0]]), torch.tensor([[-1.0, 1.0, 4.0]])
    found = packed_groups(codes, scale, zero, [1, 2, 3]).dequantize()
    assert found.tolist() == [[-0.5, -1.0, 2.0, 1.0, 6.0, 2.0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"bits": 1}, "expected 2 to 7"), ({"one_bit": "most"}, "expected abs or centred")],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PosttrainError, match=message):
        SliM(**arguments)


# -- learned clipping ------------------------------------------------------------------------------------------------


@pytest.mark.limit("slim-llm-plus")
def test_with_no_group_moved_it_is_learned_clipping() -> None:
    ids = random_tokens(6 * 12, torch.Generator().manual_seed(0)).view(6, 12)
    found = []
    for solver in (
        MixedClipping(Uniform(3, 16), epochs=2, rows=2, plan=SliM(3, 16, moved=0)),
        LearnedClipping(Uniform(3, 16), epochs=2, rows=2),
    ):
        model = make_policy("llama", None, num_hidden_layers=1).base
        compress_model(model, Compression("m", solver), [{"input_ids": ids, "use_cache": False}])
        found.append(model(input_ids=ids, use_cache=False).logits.detach())
    torch.testing.assert_close(*found, atol=1e-5, rtol=0)


def test_one_bit_ranges_begin_at_the_signs() -> None:
    weight = layer()[0]
    soft = MixedRanges(weight, [1, 3, 2, 2, 2, 2, 3, 1], rate=0.01)
    first = weight[:, :8]
    torch.testing.assert_close(soft()[:, :8], sign_levels(first).rounded(first), atol=2e-3, rtol=0)
    assert soft().shape == weight.shape
    error = (soft().detach() - weight).square().view(24, 8, 8).mean((0, 2))
    assert error[1] < error[2] < error[0]


def test_what_is_learned_is_what_is_stored() -> None:
    weight = layer()[0]
    soft = MixedRanges(weight, [1, 3, 2, 2, 2, 2, 3, 1], rate=0.01)
    packed = soft.pack()
    assert isinstance(packed, MixedColumns)
    torch.testing.assert_close(packed.dequantize(), soft().detach(), atol=1e-3, rtol=0)


def test_learning_lowers_the_blocks_error() -> None:
    ids = random_tokens(6 * 12, torch.Generator().manual_seed(0)).view(6, 12)
    errors = []
    for epochs in (0, 12):
        model = make_policy("llama", None, num_hidden_layers=1).base
        before = model(input_ids=ids, use_cache=False).logits.detach()
        solver = MixedClipping(Uniform(2, 8), epochs=epochs, rows=2, plan=SliM(2, 8, steps=4), rate=0.1)
        summary = compress_model(model, Compression("m", solver), [{"input_ids": ids, "use_cache": False}])
        errors.append(float((model(input_ids=ids, use_cache=False).logits - before).detach().square().mean()))
        assert summary.bits < 2 + (16 + 16) / 8
    assert errors[1] < 0.9 * errors[0]


def test_ends_of_one_bit_have_the_gradient_of_a_choice_that_is_fixed() -> None:
    weight = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    part = SignRange(weight, 2, 0.01)
    scale, low = part.levels()
    codes = (weight.view(3, 2, 8) > (low + scale / 2)[..., None]).float()
    found = part()
    assert torch.allclose(found, (low[..., None] + codes * scale[..., None]).view(3, 16), atol=1e-6)
    grad = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    by_upper, by_lower = torch.autograd.grad((found * grad).sum(), [part.upper, part.lower])
    high_share, low_share = torch.sigmoid(part.upper), torch.sigmoid(part.lower)
    by_group = grad.view(3, 2, 8)
    assert torch.allclose(by_upper, (by_group * codes).sum(-1) * part.high * high_share * (1 - high_share), atol=1e-5)
    assert torch.allclose(
        by_lower, (by_group * (1 - codes)).sum(-1) * part.low * low_share * (1 - low_share), atol=1e-5
    )
