"""Power grids against card 024: even levels for a = 1, errors as measured there, invariances, the search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from posttrain.compress.grids.power import Power, companded, least_exponent, peaks, power_table
from posttrain.compress.solvers.rtn import rounded
from posttrain.trajectory import PosttrainError

pytestmark = pytest.mark.limit("nupes")


def normal(rows: int = 256, columns: int = 512, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def student(rows: int = 256, columns: int = 512) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    chi = sum(torch.randn(rows, columns, generator=draw) ** 2 for _ in range(4))
    return torch.randn(rows, columns, generator=draw) / (chi / 4) ** 0.5


def error(weight: Tensor, grid: Power) -> float:
    return float((rounded(weight, grid, "w").dequantize() - weight).norm() / weight.norm())


def test_an_exponent_of_one_is_the_restricted_symmetric_grid() -> None:
    weight = normal(16, 64)
    scale = peaks(weight) / 7
    codes = torch.round(weight.clamp(-peaks(weight), peaks(weight)) / scale)
    assert torch.allclose(rounded(weight, Power(4, 0, 1.0), "w").dequantize(), codes * scale, atol=1e-6)


def test_three_numbers_by_hand() -> None:
    # m = 4, L = 1 in 2 bits; a = 0.5: (0.5 / 4)^0.5 = 0.35 -> 0, (1.5 / 4)^0.5 = 0.61 -> 1
    weight = torch.tensor([[4.0, 0.5, -1.5]])
    assert rounded(weight, Power(2, 0, 0.5), "w").dequantize().tolist() == [[4.0, 0.0, -4.0]]
    # in 3 bits L = 3 and the values are 4 (q / 3)^2: 0, 0.44, 1.78, 4
    assert rounded(weight, Power(3, 0, 0.5), "w").dequantize()[0].tolist() == pytest.approx([4.0, 4 / 9, -16 / 9])


@pytest.mark.parametrize(
    ("bits", "errors"), [(4, {1.0: 0.136, 0.7: 0.122, 0.4: 0.150}), (3, {1.0: 0.318, 0.7: 0.284})], ids=str
)
def test_relative_errors_on_normal_weights_are_those_of_the_card(bits: int, errors: dict[float, float]) -> None:
    for exponent, expected in errors.items():
        assert error(normal(), Power(bits, 0, exponent)) == pytest.approx(expected, abs=0.003)


def test_heavier_tails_ask_for_a_smaller_exponent_and_gain_more() -> None:
    exponents = [least_exponent(weight, 7) for weight in (normal(), student())]
    assert 0.6 < exponents[0] < 0.8
    assert 0.4 < exponents[1] < exponents[0]
    gains = [error(w, Power(4, 0, 1.0)) / error(w, Power(4, 0)) for w in (normal(), student())]
    assert gains[0] > 1.08
    assert gains[1] > 1.4


def test_the_search_finds_what_looking_everywhere_finds() -> None:
    weight = student(32, 128)
    found = error(weight, Power(3, 0))
    assert found <= min(error(weight, Power(3, 0, 0.2 + 0.01 * i)) for i in range(81)) * 1.005


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0, 1.2])
def test_every_code_comes_back_as_itself(bits: int, exponent: float) -> None:
    top = 2 ** (bits - 1) - 1
    values = power_table(exponent, top)[None] * 3.0
    levels = Power(bits, 0, exponent).fit(values)
    assert torch.equal(levels.nearest(values)[0], torch.arange(2 * top + 1))
    assert torch.isfinite(values).all()
    assert values[0, top] == 0


def test_scaling_the_weights_scales_the_values() -> None:
    weight = normal(8, 64)
    assert torch.equal(
        rounded(weight * 4, Power(4, 0, 0.6), "w").dequantize(), rounded(weight, Power(4, 0, 0.6), "w").dequantize() * 4
    )
    assert least_exponent(weight * 4, 7) == pytest.approx(least_exponent(weight, 7), abs=1e-3)


def test_products_commute_with_the_power() -> None:
    # before rounding, Q(w) Q(x) = L Q(w x) with the product of the scales
    w, x = torch.tensor([[0.3, -1.5, 2.0]]).double(), torch.tensor([[2.0, 0.5, -4.0]]).double()
    one = companded(w, torch.tensor(2.0), 0.6, 7) * companded(x, torch.tensor(4.0), 0.6, 7)
    assert torch.allclose(one, 7 * companded(w * x, torch.tensor(8.0), 0.6, 7))


def test_what_is_stored_stands_for_the_values() -> None:
    weight = normal(16, 96)
    weight[2] = 0.0
    grid = Power(4, 32).settled(weight)
    values = torch.cat([grid.fit(group).rounded(group) for group in weight.split(32, 1)], 1)
    assert torch.equal(rounded(weight, Power(4, 32), "w").dequantize(), values)
    assert (values[2] == 0).all()


def test_what_there_is_not() -> None:
    with pytest.raises(PosttrainError, match=r"expected 0\.2 to 1\.2"):
        Power(exponent=0.1)
    with pytest.raises(PosttrainError, match="a power grid has 2 to 8"):
        Power(1)
