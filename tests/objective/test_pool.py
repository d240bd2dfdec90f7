"""The pool's success rate as the baseline of a selected group."""

from __future__ import annotations

import pytest
import torch
from flat_batches import ragged

from posttrain.objective.batch import Batch
from posttrain.objective.pool import PoolBaseline


def pooled(rewards: list[list[float]], means: list[float], sizes: list[int]) -> Batch:
    batch = ragged([[2] * len(r) for r in rewards], rewards)
    batch.facts["pool_mean"] = torch.tensor(means)[batch.group]
    batch.facts["pool_size"] = torch.tensor(sizes, dtype=torch.float32)[batch.group]
    return batch


def test_by_hand() -> None:
    # card 128 (b): 2 of 32 are right; a balanced four: +0.9375 twice, -0.0625 twice. (c): all wrong, or all right: 0
    batch = pooled([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], [0.0625, 0.0, 1.0], [32, 32, 32])
    assert PoolBaseline().of(batch).tolist() == [0.9375, 0.9375, -0.0625, -0.0625] + [0.0] * 8


def test_scaled_by_the_pools_deviation() -> None:
    batch = pooled([[1, 0], [1, 1], [1, 0]], [0.25, 1.0, 0.5], [8, 8, 2])
    rewards = torch.tensor([1.0] * 2 + [0.0] * 6)
    found = PoolBaseline("pool").of(batch)
    expected = (torch.tensor([1.0, 0.0]) - 0.25) / (rewards.std() + 1e-6)
    torch.testing.assert_close(found[:2], expected)
    assert found[2:4].tolist() == [0, 0]
    torch.testing.assert_close(found[4:], torch.tensor([0.5, -0.5]) / (0.5**0.5 + 1e-6))


def test_the_pool_must_be_known() -> None:
    batch = pooled([[1, 0]], [0.5], [8])
    batch.facts["pool_mean"][1] = float("nan")
    with pytest.raises(RuntimeError, match="samples in pools"):
        PoolBaseline().of(batch)
    with pytest.raises(RuntimeError, match="samples in pools"):
        PoolBaseline().of(ragged([[1, 1]], [[1, 0]]))
