"""Codes of any base: packing is exact, and takes what it says."""

from __future__ import annotations

import pytest
import torch

from posttrain.compress.packed.levels import LevelsWeight, digits_in, pack_digits, unpack_digits
from posttrain.compress.packed.weight import from_written, written


@pytest.mark.parametrize(("levels", "wanted"), [(2, (1, 1)), (3, (5, 8)), (4, (1, 2)), (5, (3, 7)), (256, (1, 8))])
def test_the_cheapest_way_to_write_digits(levels: int, wanted: tuple[int, int]) -> None:
    assert digits_in(levels) == wanted


@pytest.mark.parametrize("levels", [2, 3, 5, 6, 9, 17])
@pytest.mark.parametrize("columns", [1, 2, 7, 30, 64])
def test_unpacking_undoes_packing(levels: int, columns: int) -> None:
    torch.manual_seed(0)
    codes = torch.randint(0, levels, (3, columns))
    assert torch.equal(unpack_digits(pack_digits(codes, levels), levels, columns).long(), codes)


def test_three_codes_of_five_levels_by_hand() -> None:
    assert pack_digits(torch.tensor([[4, 0, 2]]), 5).tolist() == [[4 + 2 * 25]]


def test_codes_that_are_no_digits_are_refused() -> None:
    with pytest.raises(ValueError, match="base 5"):
        pack_digits(torch.tensor([[5]]), 5)


@pytest.mark.parametrize("float_zero", [False, True])
def test_bits_values_and_files(float_zero: bool) -> None:
    torch.manual_seed(0)
    codes, scale = torch.randint(0, 5, (96, 576)), torch.rand(96, 9).half().float() + 0.1
    zero = torch.randn(96, 9).half().float() if float_zero else torch.randint(0, 5, (96, 9))
    made = LevelsWeight.of(codes, scale.half().float(), zero, 5, float_zero)
    assert made.counted_bits == pytest.approx(made.stored_bytes * 8, rel=0.03)
    by_group, s, z = codes.view(96, 9, 64), scale.half().float()[..., None], zero[..., None]
    assert torch.equal(made.dequantize(), (by_group * s + z if float_zero else (by_group - z) * s).view(96, 576))
    other = from_written(written(made))
    other.load_state_dict(made.state_dict())
    assert torch.equal(other.dequantize(), made.dequantize())
