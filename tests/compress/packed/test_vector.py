"""Vectors by index: every index is read as it was written, and what is counted is what is stored."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from posttrain.compress.packed.vector import Books, VectorWeight, pack_wide, unpack_wide
from posttrain.compress.packed.weight import from_written, written


@pytest.mark.parametrize("bits", range(1, 25))
@pytest.mark.parametrize("columns", [1, 7, 33])
def test_indices_of_any_width_are_read_as_written(bits: int, columns: int) -> None:
    draw = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 2**bits, (5, columns), generator=draw)
    codes[0, 0], codes[-1, -1] = 0, 2**bits - 1
    packed = pack_wide(codes, bits)
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_wide(packed, bits, columns), codes)


def test_indices_wider_than_24_bits_are_refused() -> None:
    with pytest.raises(ValueError, match="expected 1 to 24"):
        pack_wide(torch.zeros(1, 1, dtype=torch.int64), 25)


def random_part(rows: int, columns: int, books: Books, seed: int = 0) -> tuple[Books, Tensor, Tensor, Tensor | None]:
    draw = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**books.index_bits, (-(-rows // books.length), columns), generator=draw)
    table = torch.randn(2**books.first, books.length, generator=draw).half().float()
    second = torch.randn(2**books.residual, books.length, generator=draw).half().float() if books.residual else None
    return books, codes, table, second


def by_hand(rows: int, part: tuple[Books, Tensor, Tensor, Tensor | None]) -> Tensor:
    books, codes, table, second = part
    found = torch.zeros(rows, codes.shape[1])
    for column in range(codes.shape[1]):
        for row in range(rows):
            code, place = int(codes[row // books.length, column]), row % books.length
            found[row, column] = table[code % 2**books.first, place]
            if second is not None:
                found[row, column] += second[code // 2**books.first, place]
    return found


@pytest.mark.parametrize("rows", [8, 10])  # whole vectors, and one that is cut off
@pytest.mark.parametrize("books", [Books(4, 5), Books(4, 3, 2), Books(1, 2), Books(3, 9, 2)])
def test_weights_are_looked_up_down_the_rows_of_a_column(rows: int, books: Books) -> None:
    part = random_part(rows, 6, books)
    made = VectorWeight.of(rows, [part])
    torch.testing.assert_close(made.dequantize(), by_hand(rows, part), atol=0, rtol=0)


def test_parts_stand_at_the_places_that_the_order_says() -> None:
    parts = [random_part(8, 2, Books(2, 3), 1), random_part(8, 3, Books(4, 4), 2)]
    order = torch.tensor([3, 0, 4, 1, 2])
    made = VectorWeight.of(8, parts, order)
    wanted = torch.zeros(8, 5)
    wanted[:, order] = torch.cat([by_hand(8, part) for part in parts], 1)
    assert torch.equal(made.dequantize(), wanted)
    with pytest.raises(ValueError, match="need the order"):
        VectorWeight.of(8, parts)


def test_columns_beyond_half_of_sixteen_bits_keep_their_place() -> None:
    columns = 40_000
    parts = [(Books(1, 1), torch.zeros(1, 1, dtype=torch.int64), torch.tensor([[5.0], [6.0]]), None)]
    parts += [(Books(1, 1), torch.zeros(1, columns - 1, dtype=torch.int64), torch.zeros(2, 1), None)]
    order = torch.arange(columns).flip(0)
    found = VectorWeight.of(1, parts, order).dequantize()
    assert float(found[0, -1]) == 5.0
    assert float(found.sum()) == 5.0


def test_normalised_columns_are_scaled_back() -> None:
    part = random_part(4, 3, Books(2, 2))
    scale, offset = torch.tensor([1.0, 2.0, 0.5]), torch.tensor([0.0, -1.0, 3.0])
    found = VectorWeight.of(4, [part], normal=(scale, offset)).dequantize()
    torch.testing.assert_close(found, by_hand(4, part) * scale + offset)


SIZES = [
    ((576, 576), [(576, Books(4, 8))]),
    ((1536, 576), [(576, Books(5, 10))]),
    ((577, 576), [(8, Books(3, 9)), (284, Books(4, 8)), (284, Books(4, 8, 4))]),
    ((4096, 1024), [(1024, Books(6, 12, 12))]),
]


@pytest.mark.parametrize(("shape", "parts"), SIZES)
@pytest.mark.parametrize("normalised", [False, True])
def test_the_count_is_what_is_stored(shape: tuple[int, int], parts: list[tuple[int, Books]], normalised: bool) -> None:
    made = VectorWeight(shape, parts, normalised)
    assert made.counted_bits == pytest.approx(8 * made.stored_bytes, rel=0.03)


def test_the_count_is_the_papers_formula() -> None:
    # 4096 x 4096, v = 6, k = 4096: 2 bits of index and 16 k v bits of table (683 vectors a column, the last cut off)
    made = VectorWeight((4096, 4096), [(4096, Books(6, 12))])
    assert made.counted_bits == 683 * 4096 * 12 + 16 * 4096 * 6
    assert made.bits_per_weight == pytest.approx(2.02, abs=0.01)  # what the paper calls 2.02 bits


def test_it_is_read_from_its_description() -> None:
    parts = [random_part(8, 2, Books(2, 3), 1), random_part(8, 3, Books(4, 4, 2), 2)]
    made = VectorWeight.of(8, parts, torch.tensor([3, 0, 4, 1, 2]), (torch.ones(5), torch.zeros(5)))
    again = from_written(written(made))
    again.load_state_dict(made.state_dict())
    assert torch.equal(again.dequantize(), made.dequantize())
    assert again.counted_bits == made.counted_bits
