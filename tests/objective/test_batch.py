from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from flat_batches import pairs, ragged, sequence
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posttrain.objective.batch import PER_SEQUENCE, Batch, Totals
from posttrain.trajectory import Group, Trajectory

SHAPES = st.lists(st.lists(st.integers(1, 6), min_size=1, max_size=4), min_size=1, max_size=5)


def full(groups: list[list[int]]) -> Batch:
    """A batch with every optional array set, each entry telling which token it belongs to."""
    batch = ragged(groups)
    serial = torch.arange(batch.target.numel(), dtype=torch.float32)
    batch.old_logp, batch.reference_logp, batch.value = serial + 0.1, serial + 0.2, serial + 0.3
    batch.advantage, batch.returns = serial + 0.4, serial + 0.5
    batch.extras = {"mismatched_kl": serial + 0.6}
    batch.reward = torch.arange(len(batch), dtype=torch.float32)
    batch.rewards = {"accuracy": batch.reward + 0.7}
    return batch


def test_hand_made_trajectories_are_flattened_in_order() -> None:
    # two turns with a tool's answer (not actions) between them, beside a plain completion
    talk = Trajectory(
        torch.tensor([10, 11, 12, 13, 14, 15]),
        torch.tensor([False, False, True, False, True, True]),
        behaviour_logp=torch.tensor([0.0, 0.0, -1.0, 0.0, -2.0, -3.0]),
        turn=torch.tensor([0, 0, 0, 1, 1, 1]),
        token_reward=torch.tensor([0.0, 0.0, 0.5, 0.0, 0.0, 0.25]),
        reward=1.0,
        rewards={"accuracy": 1.0, "format": 0.5},
        label="chosen",
        finish="length",
    )
    plain = Trajectory(torch.tensor([20, 21]), torch.tensor([False, True]), reward=2.0, source="expert", weight=0.5)
    batch = Batch.of([Group([talk]), Group([plain, talk])])
    assert batch.target.tolist() == [12, 14, 15, 21, 12, 14, 15]
    assert batch.place.tolist() == [2, 4, 5, 1, 2, 4, 5]
    assert batch.sequence.tolist() == [0, 0, 0, 1, 2, 2, 2]
    assert batch.turn.tolist() == [0, 1, 1, 0, 0, 1, 1]
    assert batch.group.tolist() == [0, 1, 1]
    assert batch.lengths.tolist() == [3, 1, 3]
    assert batch.behaviour_logp[:3].tolist() == [-1.0, -2.0, -3.0]
    assert bool(batch.behaviour_logp[3].isnan())  # nobody knows who wrote it
    assert bool(batch.behaviour_logp_full.isnan().all())
    assert batch.token_reward.tolist() == [0.5, 0.0, 0.25, 0.0, 0.5, 0.0, 0.25]
    assert batch.reward.tolist() == [1.0, 2.0, 1.0]
    assert batch.rewards["format"][[0, 2]].tolist() == [0.5, 0.5]
    assert bool(batch.rewards["format"][1].isnan())
    assert batch.label.tolist() == [1, 0, 1]
    assert batch.source.tolist() == [0, 1, 0]
    assert batch.truncated.tolist() == [True, False, True]
    assert batch.weight.tolist() == [1.0, 0.5, 1.0]
    assert batch.totals == Totals(tokens=7, sequences=3, groups=2)


def test_the_first_token_is_never_an_action() -> None:
    batch = Batch.of([Group([Trajectory(torch.tensor([1, 2, 3]), torch.ones(3, dtype=torch.bool))])])
    assert batch.target.tolist() == [2, 3]


def test_empty_batches_and_sequences_without_actions_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one trajectory"):
        Batch.of([])
    silent = Trajectory(torch.tensor([1, 2]), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="without a single action token"):
        Batch.of([Group([sequence(2), silent])])


def test_sum_mean_and_spread_by_hand() -> None:
    batch = ragged([[3, 1], [2]])
    values = torch.tensor([1.0, 2.0, 6.0, 5.0, -1.0, 0.0], requires_grad=True)
    assert batch.sum(values).tolist() == [9.0, 5.0, -1.0]
    assert batch.mean(values).tolist() == [3.0, 5.0, -0.5]
    assert batch.spread(torch.tensor([7.0, 8.0, 9.0])).tolist() == [7.0, 7.0, 7.0, 8.0, 9.0, 9.0]
    batch.mean(values)[0].backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0]) / 3)


def test_select_takes_sequences_in_the_order_asked_for() -> None:
    batch = full([[3, 1], [2]])
    part = batch.select(torch.tensor([2, 0]))
    assert part.sequence.tolist() == [0, 0, 1, 1, 1]
    assert part.group.tolist() == [1, 0]  # numbers are kept, so that groups can be told apart later
    assert part.reward.tolist() == [2.0, 0.0]
    torch.testing.assert_close(part.rewards["accuracy"], torch.tensor([2.7, 0.7]))
    for name, offset in (("old_logp", 0.1), ("reference_logp", 0.2), ("value", 0.3), ("advantage", 0.4)):
        torch.testing.assert_close(getattr(part, name), torch.tensor([4.0, 5.0, 0.0, 1.0, 2.0]) + offset)
    torch.testing.assert_close(part.extras["mismatched_kl"], torch.tensor([4.6, 5.6, 0.6, 1.6, 2.6]))
    assert part.totals == Totals(tokens=5, sequences=2, groups=2)


def same(one: object, other: object) -> bool:
    if isinstance(one, Tensor):
        assert isinstance(other, Tensor)
        return torch.equal(torch.nan_to_num(one, nan=-77.0), torch.nan_to_num(other, nan=-77.0))
    if isinstance(one, list):
        assert isinstance(other, list)
        return len(one) == len(other) and all(same(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        assert isinstance(other, dict)
        return one.keys() == other.keys() and all(same(one[k], other[k]) for k in one)
    return one == other


@settings(deadline=None, max_examples=50)
@given(groups=SHAPES, seed=st.integers(0, 1000))
def test_a_shuffle_and_its_inverse_give_every_array_back(groups: list[list[int]], seed: int) -> None:
    batch = full(groups)
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(seed))
    shuffled = batch.select(order)
    assert shuffled.target.tolist() == [t for s in order for t in batch.target[batch.sequence == s].tolist()]
    back = shuffled.select(order.argsort())
    for f in fields(batch):
        assert same(getattr(batch, f.name), getattr(back, f.name)), f.name


@settings(deadline=None, max_examples=80)
@given(groups=SHAPES, budget=st.integers(1, 40), keep_groups=st.booleans())
def test_micro_batches_hold_everything_once_within_the_budget(
    groups: list[list[int]], budget: int, keep_groups: bool
) -> None:
    batch = full(groups)
    parts = batch.partition(budget, keep_groups=keep_groups)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(batch)))
    for part in parts:
        cost = 0
        present = batch.group[part].unique()
        for g in present:
            members = [int(s) for s in part if batch.group[s] == g]
            # the prompt (two tokens) is computed once for the members of a group
            cost += 2 + sum(len(batch.tokens[s]) - 2 for s in members)
        alone = len(part) == 1 or (keep_groups and len(present) == 1)
        assert cost <= budget or alone
        if keep_groups:
            assert len(part) == sum(int((batch.group == g).sum()) for g in present)
    pieces = batch.split(budget, keep_groups=keep_groups)
    assert sum(p.target.numel() for p in pieces) == batch.target.numel()
    assert [p.reward.tolist() for p in pieces] == [part.tolist() for part in parts]  # rewards number the sequences


def test_a_group_that_fits_with_its_prompt_counted_once_stays_together() -> None:
    group = Group([sequence(4, prompt=20, seed=1) for _ in range(4)])
    assert len(Batch.of([group]).partition(20 + 4 * 4, keep_groups=False)) == 1
    assert len(Batch.of([group]).partition(20 + 4 * 4 - 1, keep_groups=False)) == 2


def test_similar_lengths_share_a_micro_batch() -> None:
    batch = ragged([[1], [6], [1], [6]])
    parts = [sorted(batch.lengths[part].tolist()) for part in batch.partition(16, keep_groups=False)]
    assert parts == [[6, 6], [1, 1]]


def test_a_pair_is_never_torn_apart() -> None:
    for part in pairs([(5, 6), (1, 2), (3, 3)]).split(1, keep_groups=True):
        assert sorted(part.label.tolist()) == [-1, 1]


def test_every_per_sequence_array_is_declared() -> None:
    # a new field that is not declared would be indexed by tokens in `select`
    batch = full([[2, 3], [4]])
    for f in fields(batch):
        value = getattr(batch, f.name)
        if isinstance(value, Tensor):
            assert value.shape == ((3,) if f.name in PER_SEQUENCE else (9,)), f.name
