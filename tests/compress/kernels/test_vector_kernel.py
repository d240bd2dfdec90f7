"""Products of vector codes: equal to the looked up matrix's; and the search for the nearest entry of a table."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_levels import assert_product, every_level, needs_kernels

from posttrain.compress.kernels.library import forced, offered
from posttrain.compress.kernels.vectors import nearest_entries, vector_product
from posttrain.compress.packed.vector import Books, VectorPart, pack_wide
from posttrain.trajectory import PosttrainError


def part(rows: int, columns: int, books: Books) -> VectorPart:
    made = VectorPart(rows, columns, books)
    made.codes.copy_(pack_wide(torch.randint(0, 1 << books.index_bits, (made.vectors, columns)), books.index_bits))
    made.centroids.normal_()
    if made.residual is not None:
        made.residual.normal_()
    return made


@needs_kernels
@settings(deadline=None, max_examples=60)
@given(
    length=st.integers(1, 16), first=st.integers(1, 12), rest=st.sampled_from([0, 0, 1, 4, 8]), rows=st.integers(1, 60),
    columns=st.integers(1, 90), count=st.integers(1, 9), level=st.sampled_from(offered() or ("none",)),
    seed=st.integers(0, 2**31),
)  # fmt: skip
def test_any_shape(length, first, rest, rows, columns, count, level, seed):
    torch.manual_seed(seed)
    w, x = part(rows, columns, Books(length, first, rest)), torch.randn(count, columns)
    with forced(level):
        assert_product(vector_product(x, w.codes, w.centroids, w.residual, rows), x, w.dequantize())


@needs_kernels
@every_level
def test_parts_add_up(level):
    torch.manual_seed(0)
    w, x = part(20, 33, Books(6, 12)), torch.randn(2, 33)
    with forced(level):
        once = vector_product(x, w.codes, w.centroids, w.residual, 20)
        twice = vector_product(x, w.codes, w.centroids, w.residual, 20, once.clone())
    assert torch.allclose(twice, 2 * once, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_long_vectors_are_refused():
    w = part(40, 5, Books(20, 3))
    with pytest.raises(PosttrainError, match="vectors of 20 weights"):
        vector_product(torch.randn(1, 5), w.codes, w.centroids, None, 40)


@needs_kernels
@settings(deadline=None, max_examples=60)
@given(
    count=st.integers(0, 70), entries=st.integers(1, 300), width=st.integers(1, 20),
    level=st.sampled_from(offered() or ("none",)), seed=st.integers(0, 2**31),
)  # fmt: skip
def test_the_nearest_entry_is_found(count, entries, width, level, seed):
    draw = torch.Generator().manual_seed(seed)
    vectors, table = torch.randn(count, width, generator=draw), torch.randn(entries, width, generator=draw)
    with forced(level):
        found = nearest_entries(vectors, table)
    distances = torch.cdist(vectors.double(), table.double())
    assert found.dtype == torch.int64
    assert torch.all(distances.gather(1, found[:, None])[:, 0] <= distances.amin(1) + 1e-5)


@needs_kernels
@every_level
def test_of_equal_entries_the_first_is_taken(level):
    table = torch.tensor([[5.0, 5.0], [1.0, 2.0], [0.0, 0.0], [1.0, 2.0]]).repeat(9, 1)
    with forced(level):
        assert nearest_entries(torch.tensor([[1.1, 2.0], [4.0, 6.0], [-1.0, 0.0]]), table).tolist() == [1, 0, 2]
        assert nearest_entries(torch.tensor([[float("nan"), 0.0]]), table).tolist() == [0]


@needs_kernels
def test_vectors_and_tables_of_unlike_width_are_refused():
    for vectors, table in ((torch.zeros(3, 2), torch.zeros(4, 3)), (torch.zeros(3, 2).double(), torch.zeros(4, 2))):
        with pytest.raises(ValueError, match="a kernel was given vectors"):
            nearest_entries(vectors, table)
