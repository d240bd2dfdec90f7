"""NF4, FP4, MXFP4, NVFP4 and FP8: tables from where they come from, ties, scales as they are stored."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import norm

from posttrain.compress.grids.float8 import Float8
from posttrain.compress.grids.table import Table, nearest_entry
from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.scales import Scales, dynamic_map, nearest_dynamic
from posttrain.compress.packed.table import BOOKS
from posttrain.compress.solvers.gptq import GPTQ
from posttrain.compress.solvers.rtn import RoundToNearest, rounded
from posttrain.trajectory import PosttrainError


def normal(rows: int = 64, columns: int = 512, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


# -- the tables --------------------------------------------------------------------------------------------------------


@pytest.mark.limit("nf4")
def test_nf4_is_made_of_quantiles_of_the_normal_distribution() -> None:
    end = (1 - 1 / 30 + 1 - 1 / 32) / 2  # QLoRA's offset: 8 quantiles above 0, 7 below it, and 0
    above = [norm.ppf(end + (0.5 - end) * k / 8) for k in range(8)]
    below = [-norm.ppf(end + (0.5 - end) * k / 7) for k in range(7)]
    wanted = sorted(v / max(above) for v in (*above, *below, 0.0))
    assert list(BOOKS["nf4"]) == pytest.approx(wanted, abs=2e-4)


@pytest.mark.limit("mxfp4", "nvfp4")
def test_e2m1_is_what_its_bits_say() -> None:
    for code, value in enumerate(BOOKS["e2m1"]):
        sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
        size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
        assert value == (-size if sign else size)


@pytest.mark.parametrize("book", list(BOOKS))
@pytest.mark.limit("nf4", "fp4", "mxfp4", "nvfp4")
def test_every_value_is_the_nearest_of_the_table(book: str) -> None:
    numbers = torch.linspace(-7, 7, 4001)
    table = torch.tensor(BOOKS[book])
    found = table[nearest_entry(numbers, book)]
    assert torch.equal((found - numbers).abs(), (table[:, None] - numbers).abs().amin(0))
    assert torch.equal(table[nearest_entry(table, book)], table)


@pytest.mark.limit("fp4", "nf4")
def test_a_tie_goes_to_the_lower_value() -> None:
    middle = (BOOKS["nf4"][14] + BOOKS["nf4"][15]) / 2
    assert nearest_entry(torch.tensor([middle]), "nf4").item() == 14
    assert nearest_entry(torch.tensor([0.875 - 1 / 24]), "fp4").item() == 2  # between 2/3 and 1: 2/3 has code 2
    assert nearest_entry(-torch.tensor([0.875 - 1 / 24]), "fp4").item() == 10  # in size, as the sign is a bit


@pytest.mark.limit("mxfp4", "nvfp4")
def test_ties_go_to_the_even_mantissa() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert nearest_entry(ties, "e2m1").tolist() == [0, 2, 2, 4, 4, 6, 6]
    assert nearest_entry(-ties, "e2m1").tolist() == [8, 10, 10, 12, 12, 14, 14]


# -- scales ------------------------------------------------------------------------------------------------------------


@pytest.mark.limit("nf4", "fp4")
def test_three_numbers_by_hand() -> None:
    weight = torch.tensor([[-3.0, 0.0, 1.0]])  # scale 3: -1, 0, a third
    held = rounded(weight, Table(4, 0, "fp4", "float"), "w")
    assert held.dequantize().tolist() == [[-3.0, 0.0, 1.0]]
    held = rounded(weight, Table(4, 0, "nf4", "float"), "w")
    assert held.dequantize()[0].tolist() == pytest.approx([-3.0, 0.0, 3 * BOOKS["nf4"][11]])


@pytest.mark.limit("mxfp4")
def test_the_scale_of_mxfp4_by_hand() -> None:
    # largest 7: 2^(2 - 2) = 1, and 7 is clamped to 6; largest 0.3: 2^(-2 - 2) = 1/16, 0.3 = 4.8/16
    weight = torch.tensor([[7.0, -2.4, 0.2], [0.3, 0.07, -0.01]])
    held = rounded(weight, Table(4, 0, "e2m1", "power"), "w")
    assert held.dequantize().tolist() == [[6.0, -2.0, 0.0], [4 / 16, 1 / 16, -0.0]]
    exact = torch.tensor([[4.0, 8.0], [0.5, 0.25]])
    assert torch.equal(rounded(exact, Table(4, 0, "e2m1", "power"), "w").dequantize(), exact)


@pytest.mark.limit("mxfp4")
def test_scales_of_mxfp4_are_powers_of_two_and_the_groups_largest_lies_in_the_top_octave() -> None:
    weight = normal() * torch.logspace(-9, 9, 64)[:, None]
    for group in weight.split(32, 1):
        scale = Table(4, 32, "e2m1", "power").fit(group).scale
        assert torch.equal(torch.log2(scale), torch.log2(scale).round())
        share = group.abs().amax(1, keepdim=True) / scale
        assert ((share >= 4) & (share < 8)).all()


@pytest.mark.limit("nvfp4")
def test_scales_of_nvfp4_are_e4m3_numbers_times_one_of_the_matrix() -> None:
    weight = normal() * 0.02
    grid = Table(4, 16, "e2m1", "float8").settled(weight)
    peaks = weight.view(64, 32, 16).abs().amax(-1)
    assert grid.whole == pytest.approx(float(peaks.max()) / 6 / 448)
    held = rounded(weight, grid, "w")
    share = held.scales.values() / grid.whole  # type: ignore[operator, union-attr]
    assert torch.equal(share, share.to(torch.float8_e4m3fn).float())
    assert float(share.max()) == 448
    assert torch.allclose(held.scales.values(), peaks / 6, rtol=1 / 16)  # type: ignore[operator, union-attr]


@pytest.mark.limit("nf4")
def test_the_dynamic_type() -> None:
    table = dynamic_map()
    assert len(table) == 256
    assert (table[0].item(), table[-1].item(), (table == 0).sum().item()) == (-table[-2].item(), 1.0, 1)
    assert torch.equal(nearest_dynamic(table), torch.arange(256))
    # of the decade 0.1..1 the largest exponent has 64 numbers, in the middles of 64 equal steps
    top = table[(table > 0.1) & (table < 1)]
    assert len(top) == 64
    assert top[0].item() == pytest.approx(0.1 + 0.9 / 128)
    assert (table[1:] > table[:-1]).all()


@pytest.mark.limit("nf4")
def test_double_quantization_loses_little_and_codes_are_those_of_its_own_scales() -> None:
    weight = normal()
    plain, double = (rounded(weight, Table(4, 64, "nf4", kind), "w") for kind in ("float", "double"))
    scales = [held.scales.values() for held in (plain, double)]  # type: ignore[operator, union-attr]
    assert 0 < float((scales[0] - scales[1]).abs().max() / scales[0].mean()) < 0.02
    errors = [float((held.dequantize() - weight).norm()) for held in (plain, double)]
    assert errors[1] == pytest.approx(errors[0], rel=5e-3)
    levels = torch.tensor(BOOKS["nf4"]) * scales[1][..., None]
    nearest = (weight.view(64, 8, 64)[..., None] - levels[:, :, None]).abs().amin(-1)
    assert torch.allclose((double.dequantize() - weight).abs(), nearest.view_as(weight), atol=1e-6)


@pytest.mark.parametrize("kind", ["float", "half", "power", "float8", "double"])
def test_scales_of_one_group_are_those_of_all(kind: str) -> None:
    scale = normal(600, 3).abs() + 0.1
    whole = float(scale.mean()) if kind == "double" else float(scale.max()) / 448
    every = Scales.of(scale, kind, whole).values()  # type: ignore[arg-type]
    assert torch.equal(Scales.of(scale[:, 1:2], kind, whole).values(), every[:, 1:2])  # type: ignore[arg-type]
    assert (every > 0).all()


@pytest.mark.parametrize("book", list(BOOKS))
@pytest.mark.parametrize("kind", ["float", "half", "power", "float8", "double"])
def test_groups_of_zeros_and_of_tiny_numbers(book: str, kind: str) -> None:
    weight = torch.zeros(40, 32)
    weight[3] = 1e-30
    weight[4, :16] = torch.linspace(-1, 1, 16)
    held = rounded(weight, Table(4, 16, book, kind), "w").dequantize()  # type: ignore[arg-type]
    assert torch.isfinite(held).all()
    assert (held[:3].abs() == 0).all()


# -- FP8 ---------------------------------------------------------------------------------------------------------------


@pytest.mark.limit("fp8")
def test_fp8_by_hand() -> None:
    # at a scale of 1, 17 lies between 16 and 18 and the tie goes to the even mantissa; the smallest number is 2^-9
    weight = torch.tensor([[448.0, 17.0, -19.0, 0.0009]])
    assert rounded(weight, Float8(), "w").dequantize().tolist() == [[448.0, 16.0, -20.0, 0.0]]


@pytest.mark.limit("fp8")
@pytest.mark.parametrize(("kind", "mantissa"), [("e4m3", 3), ("e5m2", 2)])
def test_fp8_keeps_so_many_bits_of_the_mantissa(kind: str, mantissa: int) -> None:
    weight = normal()
    held = rounded(weight, Float8(8, 0, kind), "w")  # type: ignore[arg-type]
    large = weight.abs() > 0.05  # no subnormal numbers
    share = ((held.dequantize() - weight).abs() / weight.abs())[large]
    bound = 1 / (2 ** (mantissa + 1) + 1)  # half a step above a power of two
    assert 0.95 * bound < float(share.max()) <= bound * (1 + 1e-5)
    assert torch.equal(rounded(held.dequantize(), Float8(8, 0, kind), "w").dequantize(), held.dequantize())  # type: ignore[arg-type]


# -- with other parts --------------------------------------------------------------------------------------------------


@pytest.mark.limit("nf4", "fp4", "nvfp4")
@pytest.mark.parametrize("grid", [Table(4, 32), Table(4, 16, "e2m1", "float8"), Table(4, 64, "nf4", "double")])
def test_gptq_on_a_table_of_uncorrelated_inputs_is_rounding_to_nearest(grid: Table) -> None:
    moments = InputMoments(128)
    moments.add(torch.eye(128) * 3)
    weight = normal(16, 128)
    found = GPTQ(grid, damping=0.0).solve(weight, moments, None, "w").dequantize()
    assert torch.equal(found, RoundToNearest(grid).solve(weight, None, None, "w").dequantize())


@pytest.mark.limit("nf4")
def test_nf4_loses_less_of_normal_weights_than_even_levels_and_scaling_changes_nothing_else() -> None:
    weight = normal()
    found = rounded(weight, Table(4, 64, "nf4", "float"), "w").dequantize()
    assert float((found - weight).norm() / weight.norm()) < 0.1
    assert torch.equal(rounded(weight * 4, Table(4, 64, "nf4", "float"), "w").dequantize(), found * 4)


def test_what_there_is_not() -> None:
    with pytest.raises(PosttrainError, match="unknown table of values 'nf5'"):
        Table(book="nf5")
    with pytest.raises(PosttrainError, match="bits is 3; nf4 has 16 values"):
        Table(bits=3)
    with pytest.raises(PosttrainError, match="an FP8 number has 8"):
        Float8(4)
    with pytest.raises(PosttrainError, match="expected e4m3 or e5m2"):
        Float8(kind="e3m4")  # type: ignore[arg-type]
    grid = Table(4, 16, "e2m1", "float8")
    apart = [grid.fit(normal(4, 16, seed)) for seed in (0, 1)]
    with pytest.raises(ValueError, match=r"grid.settled"):
        grid.pack(torch.zeros(4, 32), apart)
    assert math.isclose(Table(4, 16, "e2m1", "float8").fit(torch.full((1, 16), 6.0)).scale.item(), 1.0)
