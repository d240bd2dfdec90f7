from __future__ import annotations

import numpy as np
import pytest
import torch

from posttrain.rollout.novelty import elliptical_bonus, novelty_order, sherman_morrison, sparse_projection

THREE = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])


def random(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_definition(v: torch.Tensor, ridge: float) -> torch.Tensor:
    inverse = torch.linalg.inv(ridge * torch.eye(v.shape[1], dtype=torch.float64) + v.T @ v)
    return torch.stack([row @ inverse @ row for row in v])


def test_bonus_by_hand() -> None:
    assert elliptical_bonus(THREE, 1e-12, centre=False).tolist() == pytest.approx([0.5, 0.5, 1.0])
    assert elliptical_bonus(THREE, 0.01, centre=False).tolist() == pytest.approx([0.49751, 0.49751, 0.99010], abs=5e-6)
    centred = elliptical_bonus(THREE, 0.01)
    assert centred.tolist() == pytest.approx([0.16543, 0.16543, 0.66170], abs=5e-6)
    assert float(centred.sum()) == pytest.approx(0.99256, abs=5e-6)  # less than the rank, which is 1
    assert centred.dtype == torch.float64


@pytest.mark.parametrize(("n", "d"), [(4, 9), (9, 4)])
def test_bonus_is_the_definition_and_bounded(n: int, d: int) -> None:
    v = random(n, d)
    torch.testing.assert_close(elliptical_bonus(v, 0.3, centre=False), by_definition(v, 0.3), rtol=1e-9, atol=1e-9)
    centred = elliptical_bonus(v, 0.01)
    torch.testing.assert_close(centred, by_definition(v - v.mean(0), 0.01), rtol=1e-9, atol=1e-9)
    assert float(centred.sum()) <= min(n - 1, d)
    assert ((centred >= 0) & (centred < 1)).all()


def test_identical_completions_are_not_novel() -> None:
    assert elliptical_bonus(random(1, 6).repeat(5, 1), 0.01).abs().max() < 1e-12
    assert elliptical_bonus(random(1, 6), 0.01).tolist() == [0.0]  # nor is a single one


def test_sherman_morrison_is_the_inverse() -> None:
    a = torch.eye(7, dtype=torch.float64) * 0.1
    inverse = torch.linalg.inv(a)
    for v in random(40, 7):
        a, inverse = a + torch.outer(v, v), sherman_morrison(inverse, v)
    torch.testing.assert_close(inverse, torch.linalg.inv(a), rtol=1e-9, atol=1e-9)


def test_the_most_novel_goes_first() -> None:
    pool = torch.tensor([[3.0, 0.0], [3.0, 0.1], [0.0, 1.0], [2.9, 0.0]])
    # the longest, then the other direction, then what is left by length
    assert novelty_order(pool, 0.01, centre=False)[:2] == [1, 2]
    assert novelty_order(pool, 0.01, centre=False, first=3)[:2] == [3, 2]


def test_the_order_is_greedy_by_definition() -> None:
    v = random(12, 5)
    chosen: list[int] = []
    while len(chosen) < 12:
        inverse = torch.linalg.inv(0.2 * torch.eye(5, dtype=torch.float64) + v[chosen].T @ v[chosen])
        left = [i for i in range(12) if i not in chosen]
        chosen.append(max(left, key=lambda i: float(v[i] @ inverse @ v[i])))
    assert novelty_order(v, 0.2, centre=False) == chosen
    assert sorted(novelty_order(v, 0.2)) == list(range(12))


def test_a_projection_keeps_lengths_and_is_sparse() -> None:
    width, dimensions = 100, 64
    matrix = sparse_projection(width, dimensions, np.random.default_rng(0))
    assert matrix.shape == (dimensions, width)
    assert matrix.dtype == torch.float32
    share = float((matrix != 0).float().mean())
    assert share == pytest.approx(0.1, abs=0.02)  # 1/sqrt(width)
    assert matrix[matrix != 0].abs().unique().tolist() == pytest.approx([(10 / 64) ** 0.5])
    x = random(width, 200, seed=1).float()
    assert float(((matrix @ x) ** 2).sum() / (x**2).sum()) == pytest.approx(1, abs=0.1)
