"""Sparse formats: bytes are those of the formulas, and what is kept comes back bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from posttrain.compress.packed.sparse import NMWeight, SparseWeight, stored_as
from posttrain.compress.packed.weight import PackedWeight, from_written, written
from posttrain.compress.solvers.sparsity import Sparsity
from posttrain.trajectory import PosttrainError


def normal(rows: int = 96, columns: int = 512, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).half().float()


def packed(sparsity: Sparsity, dtype: str = "float16") -> PackedWeight:
    weight = normal()
    return sparsity.pack(weight, sparsity.kept(weight.abs(), "layer"), dtype)


@pytest.mark.parametrize(
    ("sparsity", "bits"),
    [
        (Sparsity(0.5), 9.0),
        (Sparsity(0.9), 1 + 1.6),
        (Sparsity(0.0), 17.0),
        (Sparsity(0.5, "2:4"), 9.0),
        (Sparsity(0.75, "1:4"), 18 / 4),
        (Sparsity(0.5, "4:8"), 19 / 2),
        (Sparsity(0.5, "1:2"), 17 / 2),
    ],
)
def test_bytes_are_those_of_the_formula(sparsity: Sparsity, bits: float) -> None:
    held = packed(sparsity)
    assert held.stored_bytes * 8 == held.counted_bits
    assert held.bits_per_weight == pytest.approx(bits, rel=1e-4)


@pytest.mark.parametrize("sparsity", [Sparsity(0.3), Sparsity(0.5, "2:4"), Sparsity(0.375, "5:8")])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_what_is_kept_comes_back_and_the_rest_is_zero(sparsity: Sparsity, dtype: str) -> None:
    weight = normal().bfloat16().float() if dtype == "bfloat16" else normal()
    kept = sparsity.kept(weight.abs(), "layer")
    held = sparsity.pack(weight, kept, dtype)
    assert torch.equal(held.dequantize(), weight * kept)
    again = from_written(written(held))
    again.load_state_dict(held.state_dict())
    assert torch.equal(again.dequantize(), held.dequantize())
    assert (again.shape, again.counted_bits) == (held.shape, held.counted_bits)


def test_by_hand() -> None:
    weight, kept = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[True, False, False, True]])
    held = SparseWeight.of(weight, kept)
    assert held.mask.tolist() == [[0b1001]]
    assert held.values.tolist() == [1.0, 4.0]
    pairs = NMWeight.of(weight, kept, 2, 4)
    assert pairs.places.tolist() == [[0b1100]]  # 0, then 3
    assert pairs.dequantize().tolist() == [[1.0, 0.0, 0.0, 4.0]]


def test_a_mask_of_another_pattern() -> None:
    with pytest.raises(ValueError, match="does not keep 2 of every 4"):
        NMWeight.of(torch.ones(1, 4), torch.tensor([[True, True, True, False]]), 2, 4)
    with pytest.raises(PosttrainError, match=r"^2:4 sparsity of 6 input columns; expected a multiple of 4"):
        NMWeight((2, 6), 2, 4, "float16")


def test_precision_is_that_which_loses_least() -> None:
    assert stored_as(normal()) == "float16"
    assert stored_as(normal().bfloat16().float()) == "bfloat16"
    assert stored_as(normal() * 1e6) == "bfloat16"  # fp16 would overflow


@pytest.mark.parametrize("share", [0.0, 0.1, 0.29, 0.5, 0.7, 0.99])
def test_the_number_of_weights_that_go_is_exact(share: float) -> None:
    score = normal(10, 100).abs()
    assert int(Sparsity(share).kept(score, "layer").sum()) == 1000 - round(1000 * share)
    assert (Sparsity(share).kept(score, "row").sum(1) == 100 - round(100 * share)).all()
    assert int(Sparsity(share).kept(torch.ones(10, 100), "layer").sum()) == 1000 - round(1000 * share)  # ties


@pytest.mark.parametrize(
    ("share", "pattern", "told"),
    [
        (1.0, "", r"^sparsity is 1\.0; expected a share"),
        (-0.1, "", r"^sparsity is -0\.1"),
        (0.7, "2:4", r"^sparsity is 0\.7 and pattern 2:4, which is a sparsity of 0\.5"),
        (0.5, "4:2", r"^pattern is '4:2'; expected N:M with N below M"),
        (0.5, "two of four", r"^pattern is 'two of four'"),
    ],
)
def test_mistakes_are_told(share: float, pattern: str, told: str) -> None:
    with pytest.raises(PosttrainError, match=told):
        Sparsity(share, pattern)
