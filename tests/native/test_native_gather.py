"""Packed tokens into rectangles and back in C, at every level of the processor, beside indexing by PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.native import library
from posttrain.native.gather import gather, scatter, scatter_add

pytestmark = pytest.mark.skipif(library.library() is None, reason="posttrain was built without its C functions")
DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=library.LEVELS, autouse=True)
def level(request: pytest.FixtureRequest) -> Iterator[None]:
    found = library.library()
    if found is None or library.LEVELS.index(request.param) > int(found.posttrain_fused_level()):
        pytest.skip("this processor does not offer that level")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "level", lambda: request.param)
        yield


def rectangle(rows: list[int], tokens: int, draw: torch.Generator) -> torch.Tensor:
    """`[B, R]` rows of so many tokens, all apart, padded by -1."""
    index = torch.full((len(rows), max(rows) + 1), -1)
    for row, part in zip(index, torch.randperm(tokens, generator=draw)[: sum(rows)].split(rows), strict=True):
        row[: len(part)] = part
    return index


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(0, 5), st.integers(1, 3), st.integers(1, 40),
    st.sampled_from(DTYPES), st.booleans(), st.integers(0, 10**6),
)  # fmt: skip
def test_what_was_gathered_is_scattered_to_where_it_was(
    rows: list[int], more: int, heads: int, width: int, dtype: torch.dtype, apart: bool, seed: int
) -> None:
    draw, tokens = torch.Generator().manual_seed(seed), sum(rows) + more
    index = rectangle(rows, tokens, draw)
    x = torch.randn(heads, tokens, width + 3, generator=draw).to(dtype)[..., :width].transpose(0, 1)
    x = x if apart else x.contiguous()
    found = gather(x, index)
    real = index >= 0
    assert torch.equal(found.transpose(1, 2)[real], x[index[real]])
    assert not found.transpose(1, 2)[~real].any()
    y = torch.full(x.shape, 7.0, dtype=dtype)
    scatter(found, index, y)
    expected = torch.full_like(y, 7.0)
    expected[index[real]] = x[index[real]]
    assert torch.equal(y, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [5, 64])
def test_rows_of_one_token_are_added_up(dtype: torch.dtype, width: int) -> None:
    draw = torch.Generator().manual_seed(0)
    index = torch.randint(-1, 20, (6, 70), generator=draw)
    x = torch.randn(6, 3, 70, width, generator=draw).to(dtype)
    start = torch.randn(20, 3, width, generator=draw)
    real = index >= 0
    wanted = start.double().index_add(0, index[real], x.transpose(1, 2)[real].double())
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(start.clone())
            scatter_add(x, index, found[-1])
    finally:
        torch.set_num_threads(before)
    assert torch.allclose(found[0].double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(found[0], found[1])  # the order of a token's rows does not depend on threads
    assert torch.equal(found[0], found[2])
