"""Codes in bytes: packing and unpacking is the identity, and takes what the bit count says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.compress.packed.bits import pack, packed_width, unpack


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_at_every_place_of_a_byte(bits: int) -> None:
    codes = torch.arange(1 << bits)
    rows = torch.stack([codes.roll(shift) for shift in range(min(1 << bits, 16))])
    assert torch.equal(unpack(pack(rows, bits), bits, rows.shape[1]).long(), rows)


@given(bits=st.integers(1, 8), rows=st.integers(1, 5), columns=st.integers(1, 67), seed=st.integers(0, 1 << 30))
def test_identity_at_odd_widths(bits: int, rows: int, columns: int, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=draw)
    held = pack(codes, bits)
    assert held.dtype == torch.uint8
    assert held.shape == (rows, packed_width(columns, bits)) == (rows, -(-columns * bits // 8))
    assert torch.equal(unpack(held, bits, columns).long(), codes)


def test_lowest_bits_come_first_across_bytes() -> None:
    # 1, 2, 3 in three bits each: 100 010 110 from the lowest bit on, so bytes 1 + 16 + 64 + 128 and 0
    assert pack(torch.tensor([[1, 2, 3]]), 3).tolist() == [[209, 0]]
    assert pack(torch.tensor([[1, 2]]), 4).tolist() == [[0x21]]
    assert unpack(torch.tensor([[209, 0]], dtype=torch.uint8), 3, 3).tolist() == [[1, 2, 3]]


@pytest.mark.parametrize("codes", [[[-1]], [[4]]])
def test_codes_that_do_not_fit(codes: list[list[int]]) -> None:
    with pytest.raises(ValueError, match="do not fit into 2 bits"):
        pack(torch.tensor(codes), 2)


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_that_there_are_not(bits: int) -> None:
    with pytest.raises(ValueError, match="expected 1 to 8"):
        pack(torch.zeros(1, 1, dtype=torch.int64), bits)
