"""Which tokens of demonstrations keep their advantage."""

from __future__ import annotations

import pytest
import torch
from flat_batches import ragged

from posttrain.objective.advantage import GAE, GroupNormalised, Return
from posttrain.objective.batch import Batch
from posttrain.objective.uncertain import MostUncertain
from posttrain.trajectory import SOURCES

EXPERT = SOURCES.index("expert")


def of_entropies(lengths: list[list[int]], expert: list[int], entropy: list[float]) -> Batch:
    """Reward 1 for all; the tokens at places `expert` are a demonstration's."""
    batch = ragged(lengths, [[1.0] * len(group) for group in lengths])
    assert batch.token_source is not None
    batch.token_source[torch.tensor(expert, dtype=torch.int64)] = EXPERT
    batch.extras["old_entropy"] = torch.tensor(entropy)
    return batch


def kept(batch: Batch, keep: float) -> list[int]:
    part = MostUncertain(Return(), keep)
    part.prepare(batch)
    assert batch.advantage is not None
    return batch.advantage.nonzero()[:, 0].tolist()


@pytest.mark.limit("prefix-rft")
def test_by_hand() -> None:
    # card 035 (c): of ten the 20 % kept are those at 1 and 3
    entropy = [0.1, 0.9, 0.2, 0.8, 0.3, 0.4, 0.5, 0.6, 0.7, 0.0]
    batch = of_entropies([[10]], list(range(10)), entropy)
    assert kept(batch, 0.2) == [1, 3]
    assert kept(batch, 1.0) == list(range(10))
    assert kept(batch, 0.0) == []


def test_the_policys_own_tokens_are_left_alone() -> None:
    batch = of_entropies([[4, 3], [5]], [4, 5, 7, 8, 9], [9.0] * 4 + [0.1, 0.4, 0.0, 0.2, 0.3, 0.5, 0.0, 0.0])
    # five tokens of demonstrations over all groups of the step: floor(0.8 * 5) = 4 are dropped
    assert kept(batch, 0.2) == [0, 1, 2, 3, 6, 9, 10, 11]
    assert kept(batch, 0.5) == [0, 1, 2, 3, 5, 6, 8, 9, 10, 11]  # floor(2.5) = 2 are dropped


@pytest.mark.parametrize("count", range(1, 60))
def test_rounding_down(count: int) -> None:
    batch = of_entropies([[count]], list(range(count)), [1.0] * count)
    assert len(kept(batch, 0.2)) == count - count * 8 // 10
    assert kept(batch, 0.2)[0] == count * 8 // 10  # of equal entropies the earlier ones go


def test_without_demonstrations_it_is_the_base() -> None:
    batch = of_entropies([[2, 3]], [], [0.0] * 5)
    batch.reward = torch.tensor([1.0, 0.0])
    base = GroupNormalised("none")
    assert torch.equal(MostUncertain(base).of(batch), batch.spread(base.of(batch)))


def test_needs_what_its_base_needs() -> None:
    assert MostUncertain(Return()).needs == {"old_entropy"}
    assert MostUncertain(GAE(), 1.0).needs == GAE().needs
    assert MostUncertain(GroupNormalised()).minimum_group == 2
    assert MostUncertain(Return()).keep_groups is False
