"""Rounding to floating-point formats: bit for bit what torch's casts give, and numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from posttrain.models.float_format import BFLOAT16, E4M3, E5M2, FLOAT16, FloatFormat
from posttrain.trajectory import PosttrainError

DTYPES = {
    "float16": (FLOAT16, torch.float16),
    "bfloat16": (BFLOAT16, torch.bfloat16),
    "float8_e5m2": (E5M2, torch.float8_e5m2),
    "float8_e4m3fn": (FloatFormat(4, 3, reserved="nan", beyond="largest"), torch.float8_e4m3fn),  # torch's saturates
}


def numbers() -> Tensor:
    """fp32 patterns of every exponent, every number of the small formats, the points halfway between, and neighbours
    of all of these."""
    draw = torch.Generator().manual_seed(0)
    exponents = torch.arange(256, dtype=torch.int64)[:, None] << 23
    mantissas = torch.randint(0, 1 << 23, (256, 64), generator=draw)
    signs = torch.randint(0, 2, (256, 64), generator=draw) << 31
    anywhere = (exponents | mantissas | signs).flatten()
    anywhere = torch.where(anywhere >= 1 << 31, anywhere - (1 << 32), anywhere).to(torch.int32).view(torch.float32)
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    exact = torch.cat([every.view(torch.float16).float(), every.view(torch.bfloat16).float()])
    exact = exact[exact.isfinite()].unique()
    between = (exact[1:].double() + exact[:-1].double()).div(2).float()
    near = [torch.nextafter(t, torch.tensor(end)) for t in (exact, between) for end in (-torch.inf, torch.inf)]
    special = torch.tensor(
        [0.0, -0.0, math.inf, -math.inf, math.nan, 448.0, 464.0, 464.1, 465.0, 480.0, -1e30, 65520.0]
    )
    return torch.cat([anywhere, exact, between, *near, special])


def same(found: Tensor, expected: Tensor) -> bool:
    """Equal to the bit, but for the pattern of NaN."""
    nan = expected.isnan()
    bits = torch.equal(found[~nan].view(torch.int32), expected[~nan].view(torch.int32))
    return torch.equal(found.isnan(), nan) and bits


@pytest.mark.parametrize("name", DTYPES)
def test_bit_for_bit_as_a_cast(name: str) -> None:
    held, dtype = DTYPES[name]
    x = numbers()
    if held.beyond == "largest":
        x = x[~x.isinf()]  # which torch makes the largest number, and which stay here
    assert same(held(x), x.to(dtype).float())


@pytest.mark.parametrize("mantissa", range(1, 8))
def test_truncation_of_bf16_is_a_mask_of_its_bits(mantissa: int) -> None:
    x = numbers().to(torch.bfloat16)
    mask = -(1 << (7 - mantissa))
    masked = (x.view(torch.int16) & mask).view(torch.bfloat16)
    found = FloatFormat(8, mantissa, "truncate")(x)
    finite = x.isfinite()
    assert found.dtype == torch.bfloat16
    assert torch.equal(found[finite].view(torch.int16), masked[finite].view(torch.int16))
    assert torch.equal(found[~finite].isnan(), x[~finite].isnan())
    if mantissa == 7:
        assert torch.equal(found[finite], x[finite]), "nothing to drop"


@pytest.mark.parametrize(("exponent", "mantissa"), [(8, 7), (8, 3), (7, 7), (5, 7), (4, 2)])
def test_cutting_bits_off_is_dividing_and_dropping_the_rest(exponent: int, mantissa: int) -> None:
    x = numbers()
    whole, bare = (FloatFormat(exponent, mantissa, "truncate", subnormals=some) for some in (True, False))
    divided = whole(x.double() if exponent == 8 else x).float()  # neither is done by a mask
    assert same(whole(x), divided)
    small = x.abs() < 2.0**whole.least_exponent
    assert same(bare(x), torch.where(small, x * 0.0, divided))


def test_numbers_by_hand() -> None:
    x = torch.tensor([1.9921875, -1.9921875, 1.9])
    assert FloatFormat(8, 3, "truncate")(x).tolist() == [1.875, -1.875, 1.875]
    assert FloatFormat(8, 3)(x).tolist() == [2.0, -2.0, 1.875]
    seven = FloatFormat(7, 7, "truncate", subnormals=False, beyond="largest")
    top = 2.0**63 * (2 - 2.0**-7)
    assert seven.largest == top
    x = torch.tensor([1e30, -1e30, 2.0**-62, 1.5 * 2.0**-62, 0.99 * 2.0**-62, -1e-30, math.inf])
    assert seven(x).tolist() == [top, -top, 2.0**-62, 1.5 * 2.0**-62, 0.0, -0.0, math.inf]
    assert math.copysign(1, float(seven(x)[5])) == -1


def test_every_number_of_four_bits() -> None:
    e2m1 = FloatFormat(2, 1, reserved="nothing", beyond="largest")
    assert e2m1.largest == 6
    found = e2m1(torch.linspace(-9, 9, 3601))
    assert found.unique().tolist() == [-6.0, -4.0, -3.0, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert e2m1(torch.tensor([0.25, 0.26, 0.75, 1.25, 2.5, 3.5, 5.0, 5.1])).tolist() == [0, 0.5, 1, 1, 2, 4, 4, 6]


def test_largest_numbers() -> None:
    assert (FLOAT16.largest, E5M2.largest, E4M3.largest) == (65504.0, 57344.0, 448.0)
    assert BFLOAT16.largest == float(torch.finfo(torch.bfloat16).max)
    # of what lies beyond, without an infinity: NaN, from the middle to the number that would be the next
    ocp = E4M3(torch.tensor([448.0, 464.0, 464.1, -1e9, math.inf]))
    assert ocp[:2].tolist() == [448.0, 448.0]
    assert bool(ocp[2:].isnan().all())
    kept = FloatFormat(4, 3, reserved="nan", beyond="largest")(torch.tensor([500.0, -1e9, math.inf]))
    assert kept.tolist() == [448.0, -448.0, math.inf]


def test_in_the_dtype_that_came_and_the_same_from_any() -> None:
    x = numbers()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        found = E5M2(x.to(dtype))
        assert found.dtype == dtype
        assert same(found.float(), E5M2(x.to(dtype).float()))
    strided = torch.randn(6, 8).T[::2]
    assert torch.equal(FLOAT16(strided), strided.half().float())
    assert FLOAT16(torch.empty(0, 3)).shape == (0, 3)


def test_rounding_twice_is_rounding_once() -> None:
    for rounding in ("nearest", "truncate"):
        held = FloatFormat(5, 4, rounding, subnormals=False)
        once = held(numbers())
        assert same(held(once), once)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"exponent": 9, "mantissa": 3}, "9 exponent and 3 mantissa bits; expected 2 to 8 and 1 to 23"),
        ({"exponent": 8, "mantissa": 0}, "expected 2 to 8 and 1 to 23"),
        ({"exponent": 8, "mantissa": 3, "reserved": "nan"}, "go beyond fp32"),
        ({"exponent": 5, "mantissa": 2, "rounding": "up"}, "rounding is 'up'; expected nearest or truncate"),
    ],
)
def test_what_is_no_format(given: dict, message: str) -> None:
    with pytest.raises(PosttrainError, match=message):
        FloatFormat(**given)
