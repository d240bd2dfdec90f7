"""VPTQ: what it is with scalars, with white inputs, with few different vectors; and that each of its parts helps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from layer import correlated, loss, moments_of, white
from torch import Tensor

from posttrain.compress.grids.grid import Grid, Levels
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.compress.packed.vector import Books, VectorWeight
from posttrain.compress.packed.weight import PackedWeight
from posttrain.compress.solvers.centroids import refitted
from posttrain.compress.solvers.gptq import GPTQ, inverse_factor, prepared
from posttrain.compress.solvers.kmeans import nearest
from posttrain.compress.solvers.vptq import VPTQ, ColumnPart, normalisation, packed, quantize_columns, sizes
from posttrain.trajectory import PosttrainError

PLAIN = VPTQ(2, 4, refit=0)


def solved(solver: VPTQ, weight: Tensor, moments: object) -> Tensor:
    return solver.solve(weight, moments, None, "w").dequantize()  # type: ignore[arg-type]


# -- limits ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SharedLevels(Levels):
    table: Tensor

    def nearest(self, weight: Tensor) -> Tensor:
        return (weight[..., None] - self.table).abs().argmin(-1)

    def values(self, codes: Tensor) -> Tensor:
        return self.table[codes]


@dataclass(frozen=True)
class Shared(Grid):
    """The same evenly spaced values for every row."""

    bits: int = 2
    group: int = 0

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> SharedLevels:
        return SharedLevels(torch.tensor([-0.09, -0.03, 0.03, 0.09]).half().float())

    def pack(self, codes: Tensor, levels: Sequence[Levels], group_of: Tensor | None = None) -> PackedWeight:
        ones = torch.ones(len(codes), 1)
        return UniformWeight.of(codes, ones, 0 * ones, self.bits, "float")  # its values are the codes


@pytest.mark.limit("vptq")
def test_with_vectors_of_one_weight_and_an_even_table_it_is_gptq() -> None:
    weight, moments = correlated(24, 40)
    grid = Shared()
    codes = GPTQ(grid).solve(weight, moments, None, "w").dequantize()
    part = ColumnPart(0, 40, Books(1, 2), 24)
    part.table = grid.fit(weight).table[:, None]
    alive, hessian = prepared(weight, moments, "w")
    values = quantize_columns(alive, inverse_factor(hessian, 0.01, "w"), [part])
    assert torch.equal(part.codes, codes.long())
    torch.testing.assert_close(values, grid.fit(weight).values(codes.long()))


@pytest.mark.limit("vptq")
def test_on_white_inputs_every_vector_takes_its_nearest_centroid() -> None:
    weight = correlated(24, 16)[0]
    made = PLAIN.solve(weight, white(16), None, "w")
    assert isinstance(made, VectorWeight)
    table = made.parts[0].centroids.float()
    vectors = weight.view(6, 4, 16).transpose(1, 2).reshape(-1, 4)
    wanted = table[nearest(vectors, table)].view(6, 16, 4).transpose(1, 2).reshape(24, 16)
    torch.testing.assert_close(made.dequantize(), wanted, atol=0, rtol=0)


@pytest.mark.limit("vptq")
def test_few_different_vectors_are_kept_exactly() -> None:
    draw = torch.Generator().manual_seed(0)
    different = torch.randn(200, 4, generator=draw).half().float()
    vectors = different[torch.randint(0, 200, (16 * 32,), generator=draw)]
    weight = vectors.view(32, 16, 4).permute(1, 2, 0).reshape(64, 32)
    moments = correlated(1, 32)[1]
    assert torch.equal(solved(PLAIN, weight, moments), weight)
    torch.testing.assert_close(solved(replace(PLAIN, refit=10), weight, moments), weight, atol=1e-5, rtol=0)


def test_a_residual_table_of_one_entry_is_no_worse_on_white_inputs() -> None:
    weight = correlated(32, 24)[0]
    moments = white(24)
    alive, hessian = prepared(weight, moments, "w")
    factor = inverse_factor(hessian, 0.01, "w")
    part = ColumnPart(0, 24, Books(4, 5), 32)
    part.fit(alive, hessian.diag(), 25, 0)
    first = float((quantize_columns(alive, factor, [part]) - weight).square().sum())
    mean = part.left.T.reshape(-1, 4).mean(0, keepdim=True)
    part.residual = mean.half().float()
    second = float((quantize_columns(alive, factor, [part]) - weight).square().sum())
    assert second <= first * 1.001


@pytest.mark.parametrize(
    "solver", [PLAIN, VPTQ(4, 4, residual=8, refit=0), VPTQ(2, 4, outliers=0.1, groups=2, refit=0)]
)
def test_the_block_size_changes_nothing(solver: VPTQ) -> None:
    weight, moments = correlated(20, 64)
    found = [solved(replace(solver, block=block), weight, moments) for block in (1, 16, 64)]
    for other in found[1:]:
        assert float((other - found[0]).abs().gt(1e-6).float().mean()) < 0.02  # fp32: a tie or two may fall otherwise


# -- what is looked up is what was solved ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver",
    [
        PLAIN,
        replace(PLAIN, permute=False),
        replace(PLAIN, refit=5),
        VPTQ(3, 4, residual=5, refit=0),
        VPTQ(4, 4, refit=5),
        VPTQ(2, 3, refit=0),  # 64 rows are 21 vectors and a weight
        VPTQ(2, 3, groups=3, refit=0),
        VPTQ(2, 3, outliers=0.1, groups=2, refit=3),
        VPTQ(2, 4, normalise=True, refit=0),
        VPTQ(2, outliers=0.1, normalise=True),
    ],
)
def test_errors_stay_small_in_every_arrangement(solver: VPTQ) -> None:
    weight, moments = correlated(64, 48)
    found = solver.solve(weight, moments, None, "w")
    assert 1e-4 < loss(weight, found.dequantize(), moments) < 0.1 / 4 ** (solver.bits - 2)
    assert found.shape == (64, 48)


def test_the_stored_weight_is_the_one_that_the_loop_found() -> None:
    weight, moments = correlated(30, 48)
    alive, hessian = prepared(weight, moments, "w")
    order = torch.argsort(hessian.diag(), descending=True, stable=True)
    alive, hessian = alive[:, order], hessian[order][:, order]
    parts = VPTQ(2, 4, groups=2, refit=0).parts(alive, hessian.diag(), 2)
    values = quantize_columns(alive, inverse_factor(hessian, 0.01, "w"), parts)
    assert torch.equal(packed(30, parts, order).dequantize()[:, order], values)


def test_columns_without_inputs_neither_pull_centroids_nor_hold_weights() -> None:
    weight, _ = correlated(32, 24)
    inputs = torch.randn(200, 24, generator=torch.Generator().manual_seed(3))
    inputs[:, 5] = 0.0
    loud = weight.clone()
    loud[:, 5] = 100.0
    quiet = weight.clone()
    quiet[:, 5] = 0.0
    found = [solved(PLAIN, w, moments_of(inputs)) for w in (loud, quiet)]
    assert torch.equal(found[0], found[1])


def test_a_constant_column_is_no_division_by_zero() -> None:
    weight, moments = correlated(16, 12)
    weight[:, 3] = 0.25
    scale, offset = normalisation(weight)
    assert float(scale[3]) == 1.0
    assert float(offset[3]) == 0.25
    found = solved(replace(PLAIN, normalise=True), weight, moments)
    assert torch.isfinite(found).all()


def test_normalisation_keeps_the_error_that_of_the_weights() -> None:
    # with sigma folded into H, what is minimised is the same: scaling inputs down and weights up changes nothing
    weight, _ = correlated(32, 24)
    inputs = torch.randn(400, 24, generator=torch.Generator().manual_seed(3))
    size = torch.tensor([1.0, 4.0]).repeat(12)
    solver = replace(PLAIN, normalise=True, permute=False)
    plain = solved(solver, weight, moments_of(inputs))
    scaled = solved(solver, weight * size, moments_of(inputs / size))
    torch.testing.assert_close(scaled / size, plain, atol=2e-4, rtol=0)  # ranges are rounded to half precision


# -- each part helps -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def losses() -> dict[str, float]:
    """Card 139's own check, on a layer of 256 x 128."""
    weight, moments = correlated(256, 128, rank=32, tokens=2048)
    part = ColumnPart(0, 128, Books(4, 8), 256)
    found = {}
    for name, importance in (("even", torch.ones(128)), ("weighted", moments.hessian.diag())):
        part.fit(weight, importance, 25, 0)
        vectors = weight.T.reshape(-1, 4)
        values = part.table[nearest(vectors, part.table)].view(128, 256).T
        found[name] = loss(weight, values, moments)
    arms = {
        "compensated": PLAIN,
        "in order": replace(PLAIN, permute=False),
        "refitted": replace(PLAIN, refit=20),
        "residual": VPTQ(3, 4, residual=4, refit=0),
    }
    found |= {name: loss(weight, solved(solver, weight, moments), moments) for name, solver in arms.items()}
    grid = Uniform(2, 0, clip="mse")
    found["gptq"] = loss(weight, GPTQ(grid).solve(weight, moments, None, "w").dequantize(), moments)
    grid = Uniform(3, 0, clip="mse")
    found["gptq3"] = loss(weight, GPTQ(grid).solve(weight, moments, None, "w").dequantize(), moments)
    return found


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("weighted", "even"), ("compensated", "weighted"), ("compensated", "in order"), ("refitted", "compensated"),
        ("residual", "compensated"), ("compensated", "gptq"), ("residual", "gptq3"),
    ],
)  # fmt: skip
def test_each_part_lowers_the_error(losses: dict[str, float], better: str, worse: str) -> None:
    assert losses[better] < losses[worse]


def test_vectors_lie_along_the_rows() -> None:
    # rows come in equal fours, so four rows of a column are one number four times over; along a row they are not
    weight = correlated(16, 64)[0].repeat_interleave(4, 0)
    assert loss(weight, solved(PLAIN, weight, white(64)), white(64)) < 1e-3


# -- the tables' fit -------------------------------------------------------------------------------------------------


def test_fitted_tables_are_where_the_error_has_no_slope() -> None:
    weight, moments = correlated(32, 24)
    alive, hessian = prepared(weight, moments, "w")
    parts = VPTQ(2, 2, groups=2).parts(alive, hessian.diag(), 2)
    for part in parts:
        part.residual = torch.zeros(2, 2)
    quantize_columns(alive, inverse_factor(hessian, 0.01, "w"), parts)
    tables = [part.table.clone().requires_grad_(True) for part in parts]
    before = _table_loss(alive, hessian, parts, tables)
    slope = torch.cat([g.flatten() for g in torch.autograd.grad(before, tables)]).norm()
    for part in parts:
        part.residual = None
    refitted(alive, hessian, parts, steps=200)
    tables = [part.table.clone().requires_grad_(True) for part in parts]
    after = _table_loss(alive, hessian, parts, tables)
    assert float(after.detach()) < float(before.detach())
    # half precision leaves a little
    assert float(torch.cat([g.flatten() for g in torch.autograd.grad(after, tables)]).norm()) < 0.02 * float(slope)


def _table_loss(weight: Tensor, hessian: Tensor, parts: list[ColumnPart], tables: list[Tensor]) -> Tensor:
    found = []
    for part, table in zip(parts, tables, strict=True):
        found.append(table[part.codes].transpose(1, 2).reshape(-1, part.count)[: part.rows])
    gap = torch.cat(found, 1) - weight
    return ((gap @ hessian) * gap).sum()


@pytest.mark.parametrize("solver", [VPTQ(2, 3), VPTQ(3, 4, residual=4), VPTQ(2, 2, groups=2, normalise=True)])
def test_more_steps_never_err_more(solver: VPTQ) -> None:
    weight, moments = correlated(32, 48)
    errors = [loss(weight, solved(replace(solver, refit=n), weight, moments), moments) for n in (0, 1, 5, 30)]
    assert errors[0] > errors[1] > errors[2] >= errors[3] * 0.999


# -- sizes and refusals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "shape", "length", "index"),
    [
        (2, (4096, 4096), 6, 12), (3, (4096, 4096), 4, 12), (4, (4096, 4096), 6, 24),  # the paper's
        (2, (576, 576), 4, 8), (2, (1536, 576), 5, 10), (2, (192, 576), 4, 8),  # those of a small model
        (2, (32, 32), 1, 2),
    ],
)  # fmt: skip
def test_the_length_of_vectors_follows_from_the_cost_of_tables(
    bits: int, shape: tuple[int, int], length: int, index: int
) -> None:
    books = sizes(bits, shape[0], 0.15 * shape[0] * shape[1])
    assert (books.length, books.index_bits) == (length, index)
    assert books.table_bits <= 0.15 * shape[0] * shape[1]
    assert max(books.first, books.residual) <= 12


def test_a_small_models_layers_have_little_more_than_two_bits() -> None:
    for rows, columns in ((576, 576), (192, 576), (1536, 576), (576, 1536)):
        books = sizes(2, rows, 0.15 * rows * columns)
        made = VectorWeight((rows, columns), [(columns, books)])
        assert 2 < made.bits_per_weight < 2.2


def test_an_allocations_bits_are_heeded() -> None:
    weight, moments = correlated(32, 48)
    assert VPTQ(2).solve(weight, moments, 3.0, "w").bits_per_weight > 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bits": 9}, "bits is 9"),
        ({"bits": 3, "vector": 9}, "have 27 bits an index; expected at most 24: choose vector up to 8"),
        ({"residual": 8, "vector": 4}, "fewer bits than an index has, 8"),
        ({"groups": 0}, "groups is 0"),
        ({"outliers": 1.0}, "outliers 1.0"),
    ],
)
def test_impossible_sizes_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(PosttrainError, match=message):
        VPTQ(**arguments)  # type: ignore[arg-type]


def test_layers_that_are_too_small_are_refused_by_name() -> None:
    with pytest.raises(PosttrainError, match=r"longer than the 4 rows of blocks\.0\.gate"):
        VPTQ(2, 6).check((4, 8), "blocks.0.gate")
    with pytest.raises(PosttrainError, match="9 groups are more than the 8 columns"):
        VPTQ(2, groups=9).check((4, 8), "w")
