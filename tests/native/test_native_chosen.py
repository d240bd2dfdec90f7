"""Attention to chosen tokens in C, at every level of the processor, beside a choice and products in float64."""

from __future__ import annotations

import pytest
import torch
from native_levels import each_level
from torch import Tensor

from posttrain.compress.sparse_attention import ChosenTokens
from posttrain.compress.token_labels import FULL, PACKED, rounded
from posttrain.native import chosen

__all__ = ["each_level"]
pytestmark = pytest.mark.usefixtures("each_level")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


def made(choice: ChosenTokens, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float = 0.3) -> Tensor:
    labels = choice.labels(key)
    assert chosen.suits(query, key, value, labels)
    return choice.attend(query, key, value, labels, seen[:, None, None], scale)


def plain(choice: ChosenTokens, query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float = 0.3) -> Tensor:
    """Each head by itself; `seen`: `[rows, keys]`."""
    found = torch.empty(*query.shape[:3], value.shape[-1], dtype=torch.float64)
    for row, may in enumerate(seen):
        places = may.nonzero()[:, 0]
        for head, channels in enumerate(choice.channels.long()):
            q = query[row, head, 0]
            k, v = (t[row, head // (query.shape[1] // key.shape[1])][places] for t in (key, value))
            taken = (t[..., channels].float() if choice.label_bits <= PACKED else t[..., channels] for t in (k, q))
            label, own = (rounded(t, choice.label_bits).double() for t in taken)
            scores = label @ own
            scores[len(places) - choice.recent :] = torch.inf
            best = scores.topk(min(choice.tokens, len(places))).indices
            found[row, head, 0] = ((k[best].double() @ q.double()) * scale).softmax(0) @ v[best].double()
    return found


def close(found: Tensor, wanted: Tensor) -> bool:
    assert found.shape == wanted.shape
    return bool((found.double() - wanted).abs().max() <= TOLERANCE[found.dtype] * wanted.abs().max())


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("label_bits", [FULL, 8, 4, 3])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "value_width", "count"),
    [(1, 1, 1, 1, 1), (4, 2, 3, 5, 2), (9, 3, 64, 64, 16), (6, 1, 40, 24, 17), (2, 2, 128, 80, 32), (2, 1, 96, 7, 48)],
)
@pytest.mark.parametrize(("tokens", "recent"), [(1, 0), (7, 0), (12, 3)])
def test_ragged_rows(
    dtype: torch.dtype, label_bits: int, heads: int, kv_heads: int, width: int, value_width: int, count: int,
    tokens: int, recent: int,
) -> None:  # fmt: skip
    draw = torch.Generator().manual_seed(0)
    rows, room = 5, 53
    query = torch.randn(rows, 1, heads, width, generator=draw).to(dtype).transpose(1, 2)
    key, value = (torch.randn(rows, kv_heads, room, w, generator=draw).to(dtype) for w in (width, value_width))
    seen = torch.zeros(rows, room, dtype=torch.bool)
    for row, part in enumerate([slice(0, room), slice(9, room), slice(0, 1), slice(5, 11), slice(1, room, 2)]):
        seen[row, part] = True
    channels = torch.stack([torch.randperm(width, generator=draw)[:count].sort().values for _ in range(heads)])
    choice = ChosenTokens.of(channels, tokens, label_bits, recent)
    found = made(choice, query, key, value, seen)
    assert found.dtype == dtype
    assert close(found, plain(choice, query, key, value, seen))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("tokens", [1, 100, 2047, 2999])
def test_the_largest_of_many(tokens: int, scale: float) -> None:
    """Scores of all sizes and both signs, some equal, of which the first are taken: values tell the places."""
    scores = (torch.randn(3000, generator=torch.Generator().manual_seed(0)) * scale).bfloat16().float()
    choice = ChosenTokens.of(torch.zeros(1, 1), tokens)
    value = torch.arange(3000.0)[None, None, :, None]
    seen = torch.ones(1, 3000, dtype=torch.bool)
    found = made(choice, torch.ones(1, 1, 1, 1), scores[None, None, :, None].clone(), value, seen, scale=0.0)
    best = scores.sort(descending=True, stable=True).indices[:tokens]
    assert float(found) == pytest.approx(float(best.double().mean()), rel=1e-6)


def test_equal_scores_zeros_and_infinities() -> None:
    choice = ChosenTokens.of(torch.zeros(1, 1), 3)
    key = torch.tensor([0.0, -0.0, -torch.inf, 0.0, torch.inf, 5.0])[None, None, :, None]
    value = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])[None, None, :, None]
    labels, seen = choice.labels(key), torch.tensor([True, True, True, True, True, False])[None]
    finite = key.nan_to_num(0.0, 0.0, 0.0).contiguous()  # what scores are of; labels choose
    found = choice.attend(torch.ones(1, 1, 1, 1), finite, value, labels, seen[:, None, None], 0.0)
    assert float(found) == pytest.approx((16 + 1 + 2) / 3)


def test_threads_do_not_change_a_number() -> None:
    draw = torch.Generator().manual_seed(0)
    query, key = torch.randn(4, 6, 1, 32, generator=draw), torch.randn(4, 2, 3000, 32, generator=draw)
    choice = ChosenTokens.of(torch.arange(8).expand(6, 8), 40, 4)
    seen = torch.ones(4, 3000, dtype=torch.bool)
    before = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(made(choice, query, key, key.flip(-1).contiguous(), seen))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def test_labels_of_another_kind_are_refused() -> None:
    key, query = torch.randn(1, 1, 20, 8), torch.randn(1, 1, 1, 8)
    seen, channels = torch.ones(1, 1, 1, 20, dtype=torch.bool), torch.zeros(1, 4, dtype=torch.int16)
    with pytest.raises(ValueError, match="expected such of 4 channels"):
        chosen.attend(query, key, key, key, channels, FULL, seen, 3, 0, 1.0)
