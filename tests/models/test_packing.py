"""The packed layout: which token stands where, who may look at whom."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.models import packing
from posttrain.models.packing import Layout, pack, pack_prompts
from posttrain.objective.batch import Batch
from posttrain.trajectory import Group, Trajectory
from tiny_models import continued, ragged_batch, ragged_groups, random_tokens

GROUP = st.tuples(
    st.integers(1, 9),  # prompt
    st.lists(st.integers(1, 9), min_size=1, max_size=4),  # completions
    st.integers(0, 3),  # how many tokens of each prompt differ from the others' at its end
)


def make(shapes: list[tuple[int, list[int], int]], vocabulary: int) -> Batch:
    draw = torch.Generator().manual_seed(len(shapes))
    groups = []
    for length, completions, differing in shapes:
        group = continued(random_tokens(length, draw, vocabulary), completions, draw)
        for t in group.trajectories[1:]:
            for place in range(max(0, length - differing), length):
                t.tokens[place] = int(torch.randint(0, vocabulary, (1,), generator=draw))
        groups.append(group)
    return Batch.of(groups)


def histories(layout: Layout, window: int | None = None) -> dict[int, list[int]]:
    """The tokens that each packed query sees, itself included, read off the buckets: `packed index -> token ids`."""
    seen: dict[int, list[int]] = {}
    for bucket in layout.buckets:
        mask = bucket.within(window)[:, 0]
        real = set(bucket.query_rows.tolist())
        for row in range(mask.shape[0]):
            for q in range(mask.shape[1]):
                keys = bucket.key[row][mask[row, q]]
                if row * mask.shape[1] + q in real:
                    index = int(bucket.query[row, q])
                    assert index not in seen
                    seen[index] = layout.tokens[keys].tolist()
                else:
                    assert len(keys)  # a padded query looks somewhere
    return seen


@settings(deadline=None, max_examples=60)
@given(st.lists(GROUP, min_size=1, max_size=4), st.booleans(), st.sampled_from([1, 40, 1 << 20]), st.integers(2, 50))
def test_every_target_is_predicted_from_exactly_what_precedes_it(shapes, share, scores, vocabulary):
    batch = make(shapes, vocabulary)
    before, packing.SCORES_PER_BUCKET = packing.SCORES_PER_BUCKET, scores
    try:
        layout = pack(batch, share_prompts=share)
    finally:
        packing.SCORES_PER_BUCKET = before
    for window in (None, 3):
        seen = histories(layout, window)
        assert sorted(seen) == list(range(len(layout.tokens)))  # each packed token is a query once
        for m, source in enumerate(layout.source.tolist()):
            past = batch.tokens[int(batch.sequence[m])][: int(batch.place[m])].tolist()
            assert seen[source] == past[-window:] if window else seen[source] == past
            assert int(layout.positions[source]) == len(past) - 1
    inputs = sum(len(t) for t in batch.tokens)
    assert len(layout.tokens) <= inputs - len(batch)  # no padding, and last tokens are only predicted


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_prompts_alone_are_whole_and_apart(lengths):
    draw = torch.Generator().manual_seed(0)
    prompts = [random_tokens(n, draw) for n in lengths]
    layout = pack_prompts(prompts)
    seen = histories(layout)
    for prompt, segment, source in zip(prompts, layout.segments, layout.source.tolist(), strict=True):
        assert layout.tokens[segment.start : segment.start + segment.length].tolist() == prompt.tolist()
        assert seen[source] == prompt.tolist()


def test_a_shared_prompt_is_held_once():
    draw = torch.Generator().manual_seed(0)
    batch = Batch.of([continued(random_tokens(10, draw), [4, 4, 4], draw)])
    assert len(pack(batch).tokens) == 10 + 3 * 3
    assert len(pack(batch, share_prompts=False).tokens) == 3 * 13


def test_prompts_that_differ_share_their_common_start_alone():
    prompts = [torch.tensor([5, 6, 7, 8]), torch.tensor([5, 6, 9, 8])]
    members = [Trajectory(torch.cat([p, torch.tensor([1, 2])]), torch.arange(6) >= 4) for p in prompts]
    layout = pack(Batch.of([Group(members)]))
    assert layout.tokens.tolist() == [5, 6, 7, 8, 1, 9, 8, 1]
    assert layout.positions.tolist() == [0, 1, 2, 3, 4, 2, 3, 4]
    assert [s.offset for s in layout.segments] == [0, 2, 2]


def test_single_token_completions_need_the_prompt_alone():
    draw = torch.Generator().manual_seed(0)
    layout = pack(Batch.of([continued(random_tokens(6, draw), [1, 1, 1], draw)]))
    assert len(layout.tokens) == 6
    assert layout.source.tolist() == [5, 5, 5]


def test_tokens_behind_the_last_action_are_no_input():
    tokens = torch.arange(10)
    batch = Batch.of([Group([Trajectory(tokens, (tokens == 3) | (tokens == 5))])])
    layout = pack(batch)
    assert layout.tokens.tolist() == [0, 1, 2, 3, 4]
    assert layout.source.tolist() == [2, 4]


def test_buckets_hold_similar_lengths_within_the_limit(monkeypatch):
    monkeypatch.setattr(packing, "SCORES_PER_BUCKET", 200)
    layout = pack(ragged_batch())
    assert len(layout.buckets) > 4
    for bucket in layout.buckets:
        rows, queries, keys = bucket.mask[:, 0].shape
        assert rows == 1 or rows * queries * keys <= 200
        real = (bucket.position.amax(1) + 1).tolist()
        assert min(real) >= packing.BUCKET_RATIO * max(real)


def test_windows_are_made_once_and_only_where_they_matter():
    bucket = pack(Batch.of(ragged_groups()[:1])).buckets[0]
    keys = bucket.key.shape[1]
    assert bucket.within(None) is bucket.mask
    assert bucket.within(keys) is bucket.mask
    assert bucket.within(3) is bucket.within(3)
    assert int(bucket.within(3).sum(-1).max()) == 3


@pytest.mark.parametrize("share", [True, False])
def test_moving_to_a_device_keeps_everything(share):
    layout = pack(ragged_batch(), share_prompts=share)
    moved = layout.to(torch.device("meta"))
    assert moved.tokens.is_meta
    assert moved.source.is_meta
    for bucket, other in zip(layout.buckets, moved.buckets, strict=True):
        for name in ("query", "position", "key", "mask", "query_rows", "packed"):
            assert getattr(other, name).is_meta
            assert getattr(other, name).shape == getattr(bucket, name).shape
    assert moved.buckets[0].within(2).is_meta
    assert layout.to(torch.device("cpu")) is layout
