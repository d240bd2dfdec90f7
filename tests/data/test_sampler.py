"""Samplers: every row once an epoch, in an order that seed and epoch decide, and that survives a restart."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.data.sampler import Shuffled, Undecided
from posttrain.trajectory import Group, PosttrainError, Trajectory


@settings(deadline=None)
@given(rows=st.integers(1, 40), seed=st.integers(0, 1000), counts=st.lists(st.integers(0, 17), max_size=12))
def test_every_row_once_an_epoch(rows: int, seed: int, counts: list[int]) -> None:
    sampler = Shuffled(range(rows), seed)
    taken = [row for count in counts for row in sampler.take(count)]
    for start in range(0, len(taken), rows):
        epoch = taken[start : start + rows]
        assert len(set(epoch)) == len(epoch)
        assert set(epoch) <= set(range(rows))
    assert sampler.epoch == len(taken) / rows
    whole = Shuffled(range(rows), seed).take(len(taken))
    assert taken == whole, "how many are taken at a time does not matter"


@settings(deadline=None)
@given(rows=st.integers(1, 40), seed=st.integers(0, 1000), first=st.integers(0, 100), then=st.integers(0, 60))
def test_a_restored_sampler_goes_on_where_it_was(rows: int, seed: int, first: int, then: int) -> None:
    whole, other = Shuffled(range(rows), seed), Shuffled(range(rows), seed)
    whole.take(first)
    other.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert other.take(then) == whole.take(then)


def test_orders_differ_by_seed_and_epoch() -> None:
    rows = 50
    orders = {tuple(Shuffled(range(rows), seed).take(rows)) for seed in range(5)}
    assert len(orders) == 5
    sampler = Shuffled(range(rows), 0)
    assert sampler.take(rows) != sampler.take(rows)


def test_the_global_generator_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    Shuffled(range(10), 3).take(25)
    assert torch.equal(torch.get_rng_state(), before)


def test_no_row_is_refused() -> None:
    with pytest.raises(PosttrainError, match="no row to train on"):
        Shuffled(range(0))


def group(*rewards: float) -> Group:
    mask = torch.tensor([False, True])
    return Group([Trajectory(torch.tensor([1, 2]), mask, reward=reward) for reward in rewards])


def test_undecided_admits_groups_whose_rewards_differ() -> None:
    decided = [group(1, 1, 1), group(0, 0), group(0.1 + 0.2, 0.3)]
    undecided = [group(0, 1), group(0.5, 0.5, 0.500001), group(1)]  # one completion alone: nothing to compare
    assert Undecided(range(6)).admit([*decided, *undecided]) == undecided
    assert Shuffled(range(6)).admit([*decided, *undecided]) == [*decided, *undecided]
