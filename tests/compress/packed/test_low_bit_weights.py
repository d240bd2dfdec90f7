"""Tables, planes, trits, columns of several formats, outliers: bytes are those of the formulas, values by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from posttrain.compress.grids.bilevel import Bilevel
from posttrain.compress.grids.binary import Binary
from posttrain.compress.grids.float8 import Float8
from posttrain.compress.grids.grid import Grid
from posttrain.compress.grids.power import Power
from posttrain.compress.grids.table import Table
from posttrain.compress.grids.ternary import TernaryPlanes
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.packed.bilevel import BilevelWeight
from posttrain.compress.packed.bits import pack
from posttrain.compress.packed.linear import PackedLinear
from posttrain.compress.packed.mixed import MixedColumns
from posttrain.compress.packed.outliers import WithOutliers
from posttrain.compress.packed.planes import BinaryWeight
from posttrain.compress.packed.scales import Scales
from posttrain.compress.packed.table import OwnTables, TableWeight, group_of, looked_up
from posttrain.compress.packed.ternary import TernaryWeight
from posttrain.compress.packed.trits import pack_trits, unpack_trits
from posttrain.compress.packed.weight import PackedWeight, from_written, written
from posttrain.compress.solvers.rtn import rounded
from posttrain.trajectory import PosttrainError


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def mixed(rows: int = 96, columns: int = 512) -> PackedWeight:
    weight = normal(rows, columns)
    salient = torch.arange(columns) % 5 == 0
    parts = [rounded(weight[:, ~salient], Binary(1, 0), "w"), rounded(weight[:, salient], Uniform(4, 0), "w")]
    return MixedColumns.of(parts, salient.long())


def outliers(rows: int = 96, columns: int = 512) -> PackedWeight:
    weight = normal(rows, columns)
    return WithOutliers.of(rounded(weight, Uniform(3, 64), "w"), weight.abs() > 2.5, weight)


GRIDS: list[tuple[Grid, float]] = [
    (Table(4, 64, "nf4", "float"), 4.5),
    (Table(4, 64, "nf4", "double"), 4 + 8 / 64 + 32 / (64 * 96)),
    (Table(4, 64, "fp4", "half"), 4.25),
    (Table(4, 32, "e2m1", "power"), 4.25),
    (Table(4, 16, "e2m1", "float8"), 4.5),
    (Float8(8, 0), 8 + 32 / 512),
    (Float8(8, 128), 8.25),
    (TernaryPlanes(2, 128), 3.2 + 2 * 16 / 128),
    (TernaryPlanes(1, 64), 1.6 + 16 / 64),
    (Binary(1, 0), 1 + 32 / 512),
    (Binary(2, 128), 2 + 48 / 128),
    (Bilevel(3, 16), 3 + 6 / 16 + 64 / 256),
    (Power(4, 0), 4 + 16 / 512),
    (Power(3, 64), 3.25),
]


@pytest.mark.parametrize(("grid", "bits"), GRIDS, ids=[str(g) for g, _ in GRIDS])
def test_bytes_are_those_of_the_formula(grid: Grid, bits: float) -> None:
    held = rounded(normal(96, 512), grid, "w")
    assert held.stored_bytes * 8 == pytest.approx(held.counted_bits, rel=0.03)
    assert held.bits_per_weight == pytest.approx(bits, rel=0.015)


def test_bytes_of_mixtures_and_outliers() -> None:
    held = mixed()
    assert held.stored_bytes * 8 == pytest.approx(held.counted_bits, rel=0.03)
    few = 103  # of 512 columns in 4 bits, with a scale and a zero of 4 bits a row; the others with two numbers a row
    assert held.counted_bits == pytest.approx(96 * (few * 4 + 20 + (512 - few) + 32) + 512 + 32, rel=0.01)
    held = outliers()
    assert isinstance(held, WithOutliers)
    assert held.stored_bytes * 8 == held.counted_bits == held.base.counted_bits + 32 * held.count + 16 * 96
    tables = OwnTables.empty((96, 512), bits=2, groups=4)
    assert tables.stored_bytes * 8 == tables.counted_bits == 96 * (512 * 2 + 4 * 4 * 16) + 32 * 4


@pytest.mark.parametrize("held", [*(rounded(normal(24, 256), g, "w") for g, _ in GRIDS), mixed(), outliers()])
def test_a_description_and_a_state_make_it_again(held: PackedWeight) -> None:
    again = from_written(written(held))
    again.load_state_dict(held.state_dict())
    assert torch.equal(again.dequantize(), held.dequantize())
    assert (again.shape, again.counted_bits) == (held.shape, held.counted_bits)


@pytest.mark.parametrize("held", [*(rounded(normal(24, 256), g, "w") for g, _ in GRIDS), mixed(), outliers()])
def test_another_precision_of_the_model_is_none_of_the_weights(held: PackedWeight) -> None:
    before, size = held.dequantize(), held.stored_bytes
    linear = PackedLinear(held, torch.ones(held.shape[0])).to(torch.bfloat16)
    assert torch.equal(held.dequantize(), before)
    assert held.stored_bytes == size
    assert linear.bias is not None
    assert linear.bias.dtype == torch.bfloat16
    assert linear(torch.ones(2, held.shape[1], dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("columns", [1, 4, 5, 6, 13])
def test_trits_come_back(columns: int) -> None:
    every = torch.tensor(list(itertools.product((-1, 0, 1), repeat=5))).flatten()
    trits = every[torch.arange(3 * columns) * 7 % len(every)].view(3, columns)
    packed = pack_trits(trits)
    assert packed.shape == (3, -(-columns // 5))
    assert torch.equal(unpack_trits(packed, columns), trits.float())
    bytes_of_all = pack_trits(every.view(243, 5))
    assert bytes_of_all.flatten().unique().numel() == 243


def test_no_trit() -> None:
    with pytest.raises(ValueError, match="expected -1 to 1"):
        pack_trits(torch.tensor([2]))


def test_ternary_planes_by_hand() -> None:
    trits = torch.tensor([[[1, 0, -1, 1]], [[1, -1, 0, 0]]])
    held = TernaryWeight.of(trits, torch.tensor([[[2.0, 4.0]], [[0.5, 1.0]]]))
    assert held.dequantize().tolist() == [[2.5, -0.5, -4.0, 4.0]]


def test_binary_planes_by_hand() -> None:
    signs = torch.tensor([[[1, 0, 1]], [[0, 0, 1]]])
    held = BinaryWeight.of(
        signs,
        torch.tensor([[[2.0, 1.0]], [[0.5, 0.25]]]),
        torch.tensor([[0.125, 0.0]]),
        torch.tensor([2, 1]),
        torch.tensor([1.0, 2.0, 4.0]),
    )
    assert held.dequantize().tolist() == [[1.625, -4.75, 5.0]]


def test_own_tables_by_hand_with_groups_of_unequal_widths() -> None:
    tables = torch.tensor([[[0.0, 1.0], [2.0, 3.0]], [[-1.0, -2.0], [5.0, 6.0]]])
    held = OwnTables.of(torch.tensor([[0, 1, 1], [1, 0, 0]]), tables, 1, torch.tensor([1, 2]))
    assert held.dequantize().tolist() == [[0.0, 3.0, 3.0], [-2.0, 5.0, 5.0]]
    assert group_of(torch.tensor([1, 0, 2])).tolist() == [0, 2, 2]


def test_a_matrix_with_a_table_of_its_own() -> None:
    table = torch.tensor([0.0, 1.0, 10.0, 100.0])
    scales = Scales.of(torch.tensor([[1.0, 2.0]]), "half")
    held = TableWeight.of(torch.tensor([[3, 2, 1, 0]]), scales, 2, table)
    assert held.dequantize().tolist() == [[100.0, 10.0, 2.0, 0.0]]
    assert held.counted_bits == 4 * 2 + 2 * 16 + 4 * 32


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 8])
def test_looking_up_bytes_is_looking_up_codes(bits: int) -> None:
    codes = torch.arange(3 * 11).view(3, 11) * 5 % 2**bits
    table = torch.randn(2**bits, generator=torch.Generator().manual_seed(0))
    assert torch.equal(looked_up(pack(codes, bits), bits, 11, table), table[codes])


def test_codes_of_codes_by_hand() -> None:
    # scales 0.5 + 0.25 * code, zeros 0 + 1 * code; rows 0, 1 share a block, row 2 has one of its own
    seconds = torch.tensor([[[0], [2], [1]], [[1], [0], [3]]])
    tables = torch.tensor([[[[0.5], [1.0]], [[0.25], [2.0]]], [[[0.0], [0.0]], [[1.0], [1.0]]]])
    codes = torch.tensor([[1, 3], [2, 0], [3, 4]])
    held = BilevelWeight.of(codes, seconds, tables, 3, 3, 2, None)
    assert held.dequantize().tolist() == [[0.0, 1.0], [2.0, 0.0], [0.0, 3.0]]
    turned = BilevelWeight.of(codes, seconds, tables, 3, 3, 2, torch.tensor([1, 0]))
    assert turned.dequantize().tolist() == [[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]
    assert turned.counted_bits == held.counted_bits + 2 * 16


def test_columns_of_two_formats_stay_in_their_places() -> None:
    weight, part_of = normal(4, 6), torch.tensor([1, 0, 0, 1, 2, 0])
    parts = [rounded(weight[:, part_of == n], Float8(8, 0), "w") for n in range(3)]
    held = MixedColumns.of(parts, part_of)
    assert isinstance(held, MixedColumns)
    assert held.index_bits == 2
    for n, part in enumerate(parts):
        assert torch.equal(held.dequantize()[:, part_of == n], part.dequantize())


def test_columns_that_are_all_of_one_format() -> None:
    one = rounded(normal(4, 6), Float8(8, 0), "w")
    none = Float8(8, 0).pack(torch.zeros(4, 0), [Float8(8, 0).fit(normal(4, 1))])
    assert MixedColumns.of([none, one], torch.ones(6)) is one
    with pytest.raises(ValueError, match="part 0 has 0 columns, 1 are its"):
        MixedColumns.of([none, one], torch.tensor([0, 1, 1, 1, 1, 1]))


def test_outliers_keep_their_values() -> None:
    weight, mask = normal(5, 40), torch.zeros(5, 40, dtype=torch.bool)
    mask[0, 3] = mask[0, 39] = mask[4, 0] = True
    base = rounded(weight, Uniform(2, 0), "w")
    held = WithOutliers.of(base, mask, weight)
    assert torch.equal(held.dequantize()[mask], weight[mask].half().float())
    assert torch.equal(held.dequantize()[~mask], base.dequantize()[~mask])
    assert WithOutliers.of(base, torch.zeros_like(mask), weight) is base


def test_outliers_in_columns_beyond_what_signed_numbers_count() -> None:
    weight = torch.zeros(1, 40000)
    weight[0, 39999] = 3.0
    held = WithOutliers.of(rounded(torch.zeros(1, 40000), Float8(8, 0), "w"), weight != 0, weight)
    assert torch.equal(held.dequantize(), weight)


def test_scales_that_there_are_not() -> None:
    with pytest.raises(PosttrainError, match="expected one of float, half, power, float8, double"):
        Scales(1, 1, "quarter")  # type: ignore[arg-type]
