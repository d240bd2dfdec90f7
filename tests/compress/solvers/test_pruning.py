"""Magnitude, Wanda and SparseGPT: where they are one another, by hand, and against least squares."""

from __future__ import annotations

import pytest
import torch
from layer import correlated, loss, moments_of, white
from torch import Tensor

from posttrain.compress.moments import InputMoments
from posttrain.compress.solvers.gptq import inverse_factor
from posttrain.compress.solvers.magnitude import Magnitude
from posttrain.compress.solvers.solver import LayerSolver
from posttrain.compress.solvers.sparsegpt import SparseGPT
from posttrain.compress.solvers.sparsity import Sparsity, agreeing
from posttrain.compress.solvers.wanda import Wanda
from posttrain.trajectory import PosttrainError

HALF, PAIRS = Sparsity(0.5), Sparsity(0.5, "2:4")


def normal(rows: int = 24, columns: int = 256, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).half().float()


def solved(solver: LayerSolver, weight: Tensor, moments: InputMoments | None = None) -> Tensor:
    return solver.solve(weight, moments, None, "w").dequantize()


@pytest.mark.limit("magnitude")
@pytest.mark.limit("wanda")
@pytest.mark.limit("sparsegpt")
@pytest.mark.parametrize("kind", [Magnitude, Wanda, SparseGPT])
def test_a_sparsity_of_zero_changes_nothing(kind: type[LayerSolver]) -> None:
    weight, moments = correlated(24, 256)
    weight = weight.half().float()
    assert torch.equal(solved(kind(Sparsity(0.0)), weight, moments), weight)  # type: ignore[call-arg]


@pytest.mark.limit("magnitude")
def test_magnitude_by_hand() -> None:
    weight = torch.tensor([[1.0, -4.0, 0.5, 3.0], [6.0, 5.0, -2.0, 7.0]])
    assert solved(Magnitude(HALF), weight).tolist() == [[0.0, -4.0, 0.0, 0.0], [6.0, 5.0, 0.0, 7.0]]
    assert solved(Magnitude(HALF, "row"), weight).tolist() == [[0.0, -4.0, 0.0, 3.0], [6.0, 0.0, 0.0, 7.0]]
    assert torch.equal(solved(Magnitude(PAIRS), weight), solved(Magnitude(HALF, "row"), weight))


@pytest.mark.limit("wanda")
@pytest.mark.parametrize("sparsity", [HALF, PAIRS, Sparsity(0.8)])
def test_wanda_with_inputs_of_equal_size_is_magnitude_in_each_row(sparsity: Sparsity) -> None:
    weight = normal()
    assert torch.equal(solved(Wanda(sparsity), weight, white(256)), solved(Magnitude(sparsity, "row"), weight))
    _, uneven = correlated(24, 256)
    assert not torch.equal(solved(Wanda(sparsity), weight, uneven), solved(Magnitude(sparsity, "row"), weight))


@pytest.mark.limit("wanda")
def test_wanda_by_hand() -> None:
    # the paper's figure: |W| ||X|| compared in each row
    inputs = torch.tensor([[1.0, 2.0, 8.0], [0.0, 0.0, 6.0]])  # norms 1, 2, 10
    found = solved(Wanda(Sparsity(2 / 3)), torch.tensor([[4.0, 1.0, 0.5], [3.0, 4.0, 0.25]]), moments_of(inputs))
    assert found.tolist() == [[0.0, 0.0, 0.5], [0.0, 4.0, 0.0]]


@pytest.mark.limit("sparsegpt")
@pytest.mark.parametrize("sparsity", [HALF, PAIRS, Sparsity(0.8)])
def test_sparsegpt_with_white_inputs_is_magnitude_in_each_block(sparsity: Sparsity) -> None:
    weight = normal()
    expected = torch.cat([solved(Magnitude(sparsity), part) for part in weight.split(128, 1)], 1)
    assert torch.equal(solved(SparseGPT(sparsity), weight, white(256)), expected)


@pytest.mark.limit("sparsegpt")
@pytest.mark.parametrize("sparsity", [Sparsity(0.5), Sparsity(0.8), PAIRS])
@pytest.mark.parametrize("seed", range(3))
def test_their_layer_errors_are_in_the_order_of_what_they_look_at(sparsity: Sparsity, seed: int) -> None:
    weight, moments = correlated(48, 256, seed=seed)
    sizes = [loss(weight, solved(s, weight, moments), moments) for s in (SparseGPT(sparsity), Wanda(sparsity),
                                                                         Magnitude(sparsity))]  # fmt: skip
    assert sizes[0] < 0.7 * sizes[1]
    assert sizes[1] < 0.9 * sizes[2]


@pytest.mark.limit("sparsegpt")
def test_what_stays_behind_what_goes_is_the_least_squares_solution() -> None:
    """Where the columns that go stand first, all others can make up for them, and the best ones are known."""
    draw = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 12, generator=draw) @ torch.randn(12, 12, generator=draw)
    weight = torch.randn(5, 12, generator=draw)
    weight[:, :4] *= 1e-3  # so that these go
    weight[:, 4:] += 3 * weight[:, 4:].sign()
    moments = moments_of(inputs)
    found = solved(SparseGPT(Sparsity(1 / 3)), weight, moments)
    assert (found[:, :4] == 0).all()
    assert (found[:, 4:] != 0).all()
    hessian = moments.hessian.double()
    hessian += 0.01 * hessian.diag().mean() * torch.eye(12, dtype=torch.float64)
    # min over v of (w - v) H (w - v)^T with v = 0 in the first four
    best = weight.double()[:, 4:] + torch.linalg.solve(
        hessian[4:, 4:], hessian[4:, :4] @ weight.double()[:, :4].T
    ).T  # fmt: skip
    torch.testing.assert_close(found[:, 4:].double(), best, atol=0, rtol=2e-3)


@pytest.mark.limit("sparsegpt")
def test_sparsegpt_is_the_papers_loop() -> None:
    """Its algorithm 1 written out column by column, in which the inverse loses a row and a column a step."""
    weight, moments = correlated(6, 32)
    hessian = moments.hessian.double()
    hessian += 0.01 * hessian.diag().mean() * torch.eye(32, dtype=torch.float64)
    inverse, work, gone = torch.linalg.inv(hessian), weight.double().clone(), torch.zeros(6, 32, dtype=torch.bool)
    scales = inverse_factor(moments.hessian, 0.01, "w").diag().double() ** 2  # of the inverse left at each column
    for i in range(32):
        if i % 8 == 0:
            score = (work[:, i : i + 8] ** 2 / scales[i : i + 8]).flatten()
            gone[:, i : i + 8] = (score <= score.sort().values[score.numel() // 2 - 1]).view(6, 8)
        torch.testing.assert_close(inverse[i, i], scales[i], rtol=1e-3, atol=0)
        error = torch.where(gone[:, i], work[:, i], 0.0) / inverse[i, i]
        work[:, i + 1 :] -= error[:, None] * inverse[i, i + 1 :]
        inverse = inverse - inverse[:, i : i + 1] * inverse[i : i + 1] / inverse[i, i]
    work[gone] = 0.0
    found = solved(SparseGPT(HALF, block=8), weight, moments)
    torch.testing.assert_close(found.double(), work, rtol=5e-3, atol=1e-4)


@pytest.mark.limit("sparsegpt")
def test_two_columns_by_hand() -> None:
    # H = [[2, 1], [1, 1]]: what goes, 0.4, adds 0.4 * H01 / H11 to the other
    draw = torch.tensor([[1.0, 1.0], [1.0, 0.0]])  # X^T X = [[2, 1], [1, 1]]
    found = solved(SparseGPT(HALF, damping=0.0), torch.tensor([[0.25, 4.0]]), moments_of(draw))
    torch.testing.assert_close(found, torch.tensor([[0.0, 4.25]]))


def test_a_layer_that_a_pattern_does_not_divide() -> None:
    for kind in (Magnitude, Wanda, SparseGPT):
        with pytest.raises(PosttrainError, match=r"^down has 6 input columns, which 2:4 does not divide; expected"):
            kind(PAIRS).check((4, 6), "down")
        kind(PAIRS).check((4, 8), "down")
    with pytest.raises(PosttrainError, match=r"^block is 6; expected a multiple of 4, for 2:4"):
        SparseGPT(PAIRS, block=6)


def test_a_layer_that_met_no_token_and_bits() -> None:
    for solver in (Wanda(), SparseGPT()):
        with pytest.raises(PosttrainError, match=r"^expert met no calibration token; give more text, or skip"):
            solver.solve(normal(2, 4), InputMoments(4), None, "expert")
    with pytest.raises(PosttrainError, match=r"^w was given 4 bits and is pruned; expected no allocation"):
        Magnitude().solve(normal(2, 4), None, 4, "w")


def test_a_pattern_says_the_sparsity() -> None:
    assert agreeing(0.5, "1:4") == Sparsity(0.75, "1:4")
    assert agreeing(0.6, "") == Sparsity(0.6)
    with pytest.raises(PosttrainError, match=r"^sparsity is 0\.7 and pattern 2:4"):
        agreeing(0.7, "2:4")
    for pattern in ("4:2", "0:4", "2:2", "1:257", "two of four"):
        with pytest.raises(PosttrainError, match=f"^pattern is '{pattern}'; expected N:M, which keeps N of every M"):
            agreeing(0.5, pattern)
    for share in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(PosttrainError, match=f"^sparsity is {share}; expected a share of the weights above 0 and"):
            agreeing(share, "")
