"""Statistics of a layer's inputs against hand-computed ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from posttrain.compress.moments import InputMoments
from posttrain.trajectory import PosttrainError

TWO = torch.tensor([[1.0, -2.0], [3.0, 4.0]])


def test_two_tokens_by_hand() -> None:
    found = InputMoments(2)
    found.add(TWO)
    assert found.gram is not None
    assert found.gram.tolist() == [[10.0, 10.0], [10.0, 20.0]]
    assert found.hessian.tolist() == [[10.0, 10.0], [10.0, 20.0]]  # 2/n with n = 2
    assert (found.absmax.tolist(), found.mean_abs.tolist(), found.mean.tolist()) == ([3, 4], [2, 3], [2, 1])
    assert (found.minimum.tolist(), found.maximum.tolist(), found.count) == ([1, -2], [3, 4], 2)


def test_tokens_that_do_not_count_alike() -> None:
    found = InputMoments(2)
    found.add(TWO[None], torch.tensor([[3.0, 0.0]]))
    assert found.hessian.tolist() == [[2.0, -4.0], [-4.0, 8.0]]  # the first token alone
    assert (found.weight, found.count, found.absmax.tolist()) == (3.0, 2, [3, 4])


@given(st.lists(st.integers(0, 5), min_size=1, max_size=5), st.integers(0, 1 << 20))
def test_however_the_tokens_come(lengths: list[int], seed: int) -> None:
    x = torch.randn(sum(lengths), 3, generator=torch.Generator().manual_seed(seed))
    whole, parts = InputMoments(3, keep=2, seed=seed), InputMoments(3, keep=2, seed=seed)
    whole.add(x)
    for part in x.split(lengths):
        parts.add(part.to(torch.float64)[None])
    assert whole.gram is not None
    assert parts.gram is not None
    assert torch.allclose(whole.gram, parts.gram, atol=1e-5)
    for name in ("absmax", "minimum", "maximum", "count"):
        assert torch.equal(torch.as_tensor(getattr(whole, name)), torch.as_tensor(getattr(parts, name)))
    assert torch.allclose(whole.abs_sum, parts.abs_sum, atol=1e-5)
    assert torch.equal(whole.kept, parts.kept)
    assert len(whole.kept) == min(2, len(x))


def test_what_is_kept_is_an_even_sample() -> None:
    counts = torch.zeros(10)
    for seed in range(600):
        found = InputMoments(1, gram=False, keep=3, seed=seed)
        for value in range(10):
            found.add(torch.tensor([[float(value)]]))
        counts[found.kept[:, 0].long()] += 1
    assert counts.sum() == 1800
    assert (counts - 180).abs().max() < 45  # four standard deviations of a binomial count


def test_without_a_gram_matrix() -> None:
    found = InputMoments(2, gram=False)
    found.add(TWO)
    with pytest.raises(ValueError, match="was not collected"):
        _ = found.hessian


def test_inputs_that_are_not_finite() -> None:
    with pytest.raises(PosttrainError, match="inputs that are not finite"):
        InputMoments(2).add(torch.tensor([[1.0, torch.nan]]))
