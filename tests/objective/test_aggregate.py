from __future__ import annotations

import torch
from flat_batches import ragged
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.objective.aggregate import (
    Aggregate,
    ConstantLength,
    GroupMean,
    SequenceMean,
    SequenceSum,
    TokenMean,
)

ALL: tuple[Aggregate, ...] = (TokenMean(), SequenceMean(), SequenceSum(), ConstantLength(8), GroupMean())


def test_weights_by_hand() -> None:
    batch = ragged([[3, 1], [2]])  # 6 tokens, 3 sequences, 2 groups
    expected: dict[Aggregate, list[float]] = {
        TokenMean(): [1 / 6] * 6,
        SequenceMean(): [1 / 9] * 3 + [1 / 3] + [1 / 6] * 2,
        SequenceSum(): [1 / 3] * 6,
        ConstantLength(8): [1 / 24] * 6,
        GroupMean(): [1 / 2] * 6,
    }
    assert set(expected) == set(ALL)
    for aggregate, weights in expected.items():
        torch.testing.assert_close(aggregate(batch, batch.totals), torch.tensor(weights))


@settings(deadline=None, max_examples=40)
@given(
    groups=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=4),
    budget=st.integers(1, 30),
)
def test_a_token_weighs_the_same_in_every_micro_batch(groups: list[list[int]], budget: int) -> None:
    batch = ragged(groups)
    parts = batch.partition(budget, keep_groups=False)
    for aggregate in ALL:
        whole = aggregate(batch, batch.totals)
        for part in parts:
            micro = batch.select(part)
            taken = torch.cat([whole[batch.sequence == s] for s in part])
            assert torch.equal(aggregate(micro, batch.totals), taken)


@settings(deadline=None, max_examples=40)
@given(groups=st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), min_size=1, max_size=4))
def test_means_are_means(groups: list[list[int]]) -> None:
    batch = ragged(groups)
    values = torch.arange(batch.target.numel(), dtype=torch.float32)
    torch.testing.assert_close((TokenMean()(batch, batch.totals) * values).sum(), values.mean())
    torch.testing.assert_close((SequenceMean()(batch, batch.totals) * values).sum(), batch.mean(values).mean())
    torch.testing.assert_close((SequenceSum()(batch, batch.totals) * values).sum(), batch.sum(values).mean())
    torch.testing.assert_close((ConstantLength(4)(batch, batch.totals) * values).sum(), batch.sum(values).mean() / 4)
    torch.testing.assert_close((GroupMean()(batch, batch.totals) * values).sum(), values.sum() / len(groups))
