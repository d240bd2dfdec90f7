"""Attention of a decode step in C, at every level of the processor, beside plain products over each row's tokens."""

from __future__ import annotations

import pytest
import torch
from native_levels import each_level
from torch import Tensor

from posttrain.models.attention import LayerState
from posttrain.native import library, slots
from posttrain.rollout.slots import Slots

__all__ = ["each_level"]
pytestmark = pytest.mark.usefixtures("each_level")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def plain(query: Tensor, keys: Tensor, values: Tensor, at: Tensor, scale: float, window: int | None) -> Tensor:
    """In float64, each row's seen tokens cut out of the slots."""
    rows = []
    for q, k, v, last in zip(query.double(), keys.double(), values.double(), at.tolist(), strict=False):
        part = slice(0 if window is None else max(0, last + 1 - window), last + 1)
        k, v = (t[:, part].repeat_interleave(len(q) // len(t), 0) for t in (k, v))
        rows.append(((q @ k.transpose(-1, -2)) * scale).softmax(-1) @ v)
    return torch.stack(rows).transpose(1, 2)


def close(found: Tensor, wanted: Tensor) -> bool:
    assert found.shape == wanted.shape
    return bool((found.double() - wanted.double()).abs().max() <= TOLERANCE[found.dtype] * wanted.abs().max())


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "value_width"),
    [(1, 1, 1, 1), (4, 2, 3, 5), (9, 3, 64, 64), (6, 1, 40, 24), (8, 1, 80, 128), (2, 2, 16, 7)],
)
@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_ragged_rows(
    dtype: torch.dtype, heads: int, kv_heads: int, width: int, value_width: int, window: int | None
) -> None:
    torch.manual_seed(0)
    rows, room = 6, 37
    at = torch.tensor([0, 36, 15, 16, 17, 5])
    keys, values = (torch.full((rows + 2, kv_heads, room, w), torch.nan).to(dtype) for w in (width, value_width))
    for row, last in enumerate(at.tolist()):  # whatever lies behind a row is not read
        keys[row, :, :last], values[row, :, :last] = (torch.randn(kv_heads, last, w) for w in (width, value_width))
    query = (3 * torch.randn(rows, 1, heads, width)).to(dtype).transpose(1, 2)
    key, value = (torch.randn(rows, 1, kv_heads, w).to(dtype).transpose(1, 2) for w in (width, value_width))
    before = keys.clone()
    found = slots.attend(query, key, value, keys, values, at, 0.3, window)
    assert found.dtype == dtype
    assert torch.equal(keys[torch.arange(rows), :, at], key[:, :, 0])
    assert torch.equal(values[torch.arange(rows), :, at], value[:, :, 0])
    before[torch.arange(rows), :, at] = key[:, :, 0]
    assert torch.equal(keys.nan_to_num(9.0), before.nan_to_num(9.0))
    assert close(found, plain(query, keys, values, at, 0.3, window))


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_slots_decode_as_on_the_plain_path(dtype: torch.dtype) -> None:
    """Rows of different prompts, admitted, decoded until the slots have grown, compacted, and decoded on."""
    torch.manual_seed(0)

    def state(tokens: int) -> dict[int, LayerState]:
        return {0: LayerState(torch.randn(2, tokens, 8).to(dtype), torch.randn(2, tokens, 8).to(dtype), None)}

    both = Slots(5, 60), Slots(5, 60)
    first, second = state(3), state(29)
    for held in both:
        held.admit(first, slice(0, 3), 3)
        held.admit(second, slice(2, 29), 2)
    for step in range(12):
        if step == 9:
            for held in both:
                held.compact(torch.tensor([1, 4]))
        positions = [held.begin_step() for held in both]
        assert torch.equal(*positions)
        rows = len(positions[0])
        query, key, value = (torch.randn(rows, heads, 1, 8).to(dtype) for heads in (6, 2, 2))
        window = None if step % 2 else 8
        found = both[0].attend(0, query, key, value, 0.4, window=window)
        with library.switched_off():
            wanted = both[1].attend(0, query, key, value, 0.4, window=window)
        assert close(found, wanted.double())
        assert torch.equal(both[0].keys[0][:rows], both[1].keys[0][:rows])


def test_what_is_not_finite_comes_out() -> None:
    keys, values = torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)
    query, key, value = torch.ones(1, 1, 1, 4), torch.full((1, 1, 1, 4), torch.nan), torch.ones(1, 1, 1, 4)
    assert slots.attend(query, key, value, keys, values, torch.tensor([2]), 1.0).isnan().all()


def test_threads_do_not_change_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(2, 5, 3, 20, 16)
    query, key, value = (torch.randn(5, heads, 1, 16) for heads in (9, 3, 3))
    found = []
    for count in (1, 2):
        monkeypatch.setattr(library, "threads", lambda _, count=count: count)
        found.append(slots.attend(query, key, value, keys.clone(), values.clone(), torch.arange(5) + 9, 0.25))
    assert torch.equal(*found)
