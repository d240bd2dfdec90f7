"""Packed labels hold what rounded ones do, in the bits that card 146 counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.compress.token_labels import packed, reads, rounded, unpacked

pytestmark = pytest.mark.limit("double-sparsity")


def test_labels_are_rounded_between_their_least_and_largest() -> None:
    labels = torch.tensor([[0.0, 1.0, 2.2, 3.0], [5.0, 5.0, 5.0, 5.0]])
    assert rounded(labels, 1).tolist() == [[0.0, 0.0, 3.0, 3.0], [5.0] * 4]
    torch.testing.assert_close(rounded(labels, 2), torch.tensor([[0.0, 1.0, 2.0, 3.0], [5.0] * 4]))
    assert rounded(labels, 16) is labels
    assert (rounded(labels, 8) - labels).abs().max() <= 3 / 255 / 2 + 1e-6


@given(st.integers(1, 70), st.integers(1, 4), st.integers(0, 99))
def test_packed_labels_are_the_rounded_ones(count: int, bits: int, seed: int) -> None:
    labels = torch.randn(2, 3, 4, count, generator=torch.Generator().manual_seed(seed))
    held = packed(labels, bits)
    assert torch.equal(unpacked(held, count), rounded(labels, bits))
    total = held[..., -1].contiguous().view(torch.float32)
    torch.testing.assert_close(total, rounded(labels, bits).sum(-1), atol=1e-4, rtol=1e-5)


def test_a_packed_label_is_four_bits_a_channel_and_three_numbers() -> None:
    assert packed(torch.randn(5, 32), 4).nbytes == 5 * (32 / 2 + 12)
    assert packed(torch.randn(5, 20), 2).nbytes == 5 * (32 / 2 + 12)  # channels come in sixteens


def test_what_is_read() -> None:
    """(d): a sixteenth of channels by 4 bits of a quarter, and of tokens."""
    assert reads(4096, 128, 32, 256, 4) == 4096 * 32 / 4 + 2 * 256 * 128
    assert reads(4096, 128, 32, 256, 4) / (2 * 4096 * 128) == pytest.approx(1 / 32 + 1 / 16)
    assert reads(100, 8, 8, 200) == 100 * 8 + 2 * 100 * 8
