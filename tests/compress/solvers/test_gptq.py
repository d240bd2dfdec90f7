"""GPTQ in the limits of card 000, and by hand on two columns."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from posttrain.compress.grids.uniform import Uniform, UniformLevels
from posttrain.compress.moments import InputMoments
from posttrain.compress.solvers.gptq import GPTQ, feed_back, inverse_factor
from posttrain.compress.solvers.rtn import RoundToNearest
from posttrain.trajectory import PosttrainError

pytestmark = pytest.mark.limit("gptq")


def weights(rows: int = 24, columns: int = 192, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def moments(x: Tensor) -> InputMoments:
    found = InputMoments(x.shape[1])
    found.add(x)
    return found


def correlated(columns: int = 192, tokens: int = 600, seed: int = 0) -> Tensor:
    """Inputs of rank 32 and noise, as in card 000."""
    draw = torch.Generator().manual_seed(seed)
    low = torch.randn(tokens, 32, generator=draw) @ torch.randn(32, columns, generator=draw)
    return low + 0.3 * torch.randn(tokens, columns, generator=draw)


def solved(weight: Tensor, x: Tensor, grid: Uniform, **options: object) -> Tensor:
    return GPTQ(grid, **options).solve(weight, moments(x), None, "w").dequantize()  # type: ignore[arg-type]


def nearest(weight: Tensor, grid: Uniform) -> Tensor:
    return RoundToNearest(grid).solve(weight, None, None, "w").dequantize()


def loss(weight: Tensor, found: Tensor, x: Tensor) -> float:
    return float(((weight - found) @ x.T).square().sum() / (weight @ x.T).square().sum())


@pytest.mark.parametrize("grid", [Uniform(3, 64), Uniform(2, 0, "none"), Uniform(4, 32, "float", "mse")])
@pytest.mark.parametrize("act_order", [False, True])
def test_with_inputs_that_are_white_it_is_round_to_nearest(grid: Uniform, act_order: bool) -> None:
    weight, white = weights(), torch.eye(192) * 3.0
    assert torch.equal(solved(weight, white, grid, act_order=act_order), nearest(weight, grid))


def fed_back(weight: Tensor, factor: Tensor, block: int, group: int = 0) -> Tensor:
    """On the grid of whole numbers."""
    return feed_back(weight, factor, lambda column, now, whole: now.round(), block, group)


def factor_of(x: Tensor) -> Tensor:
    hessian = x.T.double() @ x.double() + 0.01 * torch.eye(x.shape[1], dtype=torch.float64)
    return torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)


@pytest.mark.parametrize("block", [1, 7, 128, 192])
def test_the_block_only_changes_speed(block: int) -> None:
    weight, factor = 3 * weights().double(), factor_of(correlated())
    assert torch.equal(fed_back(weight, factor, block), fed_back(weight, factor, 64))


@pytest.mark.parametrize("block", [1, 128, 1000])
def test_the_block_only_changes_speed_in_single_precision_too(block: int) -> None:
    weight, x, grid = weights(8, 64), correlated(64), Uniform(3, 0)
    assert torch.equal(solved(weight, x, grid, block=block), solved(weight, x, grid, block=16))


def test_it_is_the_papers_elimination_column_by_column() -> None:
    """Against the form of the paper's section 2: after each column the inverse loses its row and column."""
    weight, x = 2 * weights(6, 10).double(), correlated(10)
    hessian = x.T.double() @ x.double() + 0.01 * torch.eye(10, dtype=torch.float64)
    expected, inverse = weight.clone(), torch.linalg.inv(hessian)
    for i in range(10):
        rounded = expected[:, i].round()
        error = (expected[:, i] - rounded) / inverse[i, i]
        expected -= error[:, None] * inverse[i][None]
        expected[:, i] = rounded
        inverse = inverse - inverse[:, i : i + 1] * inverse[i : i + 1] / inverse[i, i]
    assert torch.equal(fed_back(weight, factor_of(x), 4), expected.round())


def test_two_columns_by_hand() -> None:
    # H = [[2, 1], [1, 1]], its inverse [[1, -1], [-1, 2]]; rounding 0.4 to 0 moves the other column by 0.4 * H01/H11
    factor = torch.linalg.cholesky(torch.linalg.inv(torch.tensor([[2.0, 1.0], [1.0, 1.0]])), upper=True)
    found = fed_back(torch.tensor([[0.4, 0.3]]), factor, 1)
    assert found.tolist() == [[0.0, 1.0]]  # 0.3 + 0.4 = 0.7
    assert fed_back(torch.tensor([[0.4, 0.0]]), factor, 1).tolist() == [[0.0, 0.0]]


def test_activation_order_changes_nothing_where_the_diagonal_falls_already() -> None:
    weight, grid = weights(8, 48), Uniform(3, 0)
    falling = torch.linspace(3, 0.1, 48)
    x = correlated(48)
    x = x / x.square().sum(0).sqrt() * falling
    assert (moments(x).hessian.diag().diff() < 0).all()
    assert torch.equal(solved(weight, x, grid, act_order=True), solved(weight, x, grid))
    other = x.flip(1)
    assert not torch.equal(solved(weight, other, grid, act_order=True), solved(weight, other, grid))


def test_activation_order_is_solving_the_columns_in_that_order() -> None:
    weight, x, grid = weights(8, 48), correlated(48), Uniform(3, 0)
    order = moments(x).hessian.diag().argsort(descending=True, stable=True)
    found = solved(weight, x, grid, act_order=True)
    assert torch.equal(found[:, order], solved(weight[:, order], x[:, order], grid))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("group", [64, 0])
def test_its_layer_error_is_below_that_of_rounding(bits: int, group: int) -> None:
    for seed in range(3):
        weight, x, grid = weights(seed=seed), correlated(seed=seed), Uniform(bits, group)
        plain = loss(weight, nearest(weight, grid), x)
        found = loss(weight, solved(weight, x, grid), x)
        ordered = loss(weight, solved(weight, x, grid, act_order=True), x)
        assert found < 0.6 * plain
        assert ordered < 0.6 * plain


@pytest.mark.parametrize("group", [16, 24])  # 24: no whole number of blocks of 16
def test_the_levels_of_a_group_are_fitted_to_its_corrected_weights(group: int) -> None:
    """Later groups with all that the columns before them have carried over."""
    weight, x = weights(4, 48), correlated(48)
    factor = inverse_factor(moments(x).hessian, 0.01, "w")
    grid = Uniform(3, group)
    levels: list[UniformLevels] = []

    def by_group(column: int, now: Tensor, whole: Tensor) -> Tensor:
        if column % group == 0:
            levels.append(grid.fit(whole[:, column : column + group]))
        return levels[-1].rounded(now)

    expected = feed_back(weight, factor, by_group, 1)
    for block in (1, 4, 16, 128):
        assert torch.allclose(solved(weight, x, grid, block=block), expected)


def test_inputs_that_are_always_zero() -> None:
    weight, x = weights(4, 16), correlated(16)
    x[:, 3] = 0.0
    found = solved(weight, x, Uniform(4, 0))
    assert (found[:, 3].abs() <= 1e-6).all()
    assert torch.isfinite(found).all()


def test_a_hessian_that_is_singular_is_damped_more_with_a_warning() -> None:
    x = torch.ones(4, 8)  # rank 1, fewer tokens than inputs
    assert torch.isfinite(solved(weights(4, 8), x, Uniform(4, 0))).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        inverse_factor(moments(x).hessian, 0.01, "w")
    with pytest.warns(UserWarning, match="w: the Hessian of its inputs needs a damping of"):
        inverse_factor(torch.diag(torch.tensor([1.0, -1e-5])), 0.0, "w")


@pytest.mark.filterwarnings("ignore:w. the Hessian")
def test_a_hessian_that_cannot_be_factored() -> None:
    with pytest.raises(PosttrainError, match=r"^w: the Hessian of its inputs cannot be factored; give more"):
        inverse_factor(torch.diag(torch.tensor([1.0, -1.0])), 0.01, "w")


def test_a_layer_that_met_no_token() -> None:
    with pytest.raises(PosttrainError, match=r"^experts\.3 met no calibration token; give more text, or skip the l"):
        GPTQ(Uniform(4, 0)).solve(weights(2, 4), InputMoments(4), None, "experts.3")
