"""What processes share out: each group once, about as many tokens each, whatever the batch; and the parts they save."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import methods, processes
from posttrain.objective.batch import Batch
from posttrain.processes import Processes
from posttrain.training import checkpoint, parallel, signals
from posttrain.training.checkpoint import Part
from posttrain.training.collect import Collected
from posttrain.training.parallel import check_batch, micro_batches, seed_step, shares
from posttrain.training.settings import Settings
from posttrain.trajectory import Group, PosttrainError, Trajectory
from tiny_training import demonstrations, offline, pairs

Alone = Callable[..., None]


@pytest.fixture
def as_process(monkeypatch: pytest.MonkeyPatch) -> Alone:
    """Be one of several processes, who do not talk."""

    def be(rank: int, world: int, sharded: bool = False) -> None:
        monkeypatch.setitem(processes._state, "here", Processes(rank, world, sharded))

    for module in (checkpoint, parallel, processes):
        monkeypatch.setattr(module, "everyone", lambda fact: [fact])
    for adding in (parallel, processes, signals):
        monkeypatch.setattr(adding, "add", lambda values: values)
    monkeypatch.setattr(checkpoint, "agree", lambda fact: fact if fact is not None else False)
    monkeypatch.setattr(checkpoint, "wait", lambda: None)
    return be


def batch_of(groups: list[list[int]]) -> Batch:
    """Groups of sequences of these lengths, of which the first token is the prompt."""
    return Batch.of([Group([Trajectory(torch.arange(n), torch.arange(n) > 0) for n in group]) for group in groups])


GROUPS = st.lists(st.lists(st.integers(2, 40), min_size=1, max_size=4), min_size=1, max_size=9)


@settings(deadline=None)
@given(GROUPS, st.integers(1, 5))
def test_every_group_is_one_processs(groups: list[list[int]], world: int) -> None:
    batch = batch_of(groups)
    found = shares(batch, world)
    assert len(found) == world
    assert sorted(torch.cat(found).tolist()) == list(range(len(batch)))
    owners = [{int(g) for g in batch.group[share]} for share in found]
    assert sum(len(own) for own in owners) == len(groups), "a group is not split"
    if len(groups) >= world:
        assert all(owners), "nobody is idle"
    load = [sum(len(batch.tokens[s]) for s in share.tolist()) for share in found]
    assert max(load) <= sum(load) / world + max(sum(group) for group in groups)


@settings(deadline=None, max_examples=40)
@given(GROUPS, st.integers(1, 4), st.integers(8, 60), st.booleans())
def test_spread_weights_take_all_as_often_through_the_model(
    groups: list[list[int]], world: int, budget: int, keep: bool
) -> None:
    batch, before = batch_of(groups), dict(processes._state)
    try:
        each = []
        for rank in range(world):
            processes._state["here"] = Processes(rank, world, True)
            each.append(micro_batches(batch, budget, keep_groups=keep))
    finally:
        processes._state.update(before)
    assert len({len(pieces) for pieces in each}) == 1
    counted = [s for pieces in each for piece in pieces if piece.counts for s in piece.sequences.tolist()]
    assert sorted(counted) == list(range(len(batch)))


def test_one_process_takes_its_micro_batches_as_ever() -> None:
    batch = batch_of([[5, 9], [30], [7, 7, 7]])
    found = micro_batches(batch, 20, keep_groups=False)
    expected = batch.partition(20, keep_groups=False)
    assert all(piece.counts for piece in found)
    assert [piece.sequences.tolist() for piece in found] == [part.tolist() for part in expected]


@pytest.mark.parametrize("world", [2, 3])
def test_gradients_of_the_shares_add_up_to_one_processs(world: int, as_process: Alone) -> None:
    """Their mean would not: the shares hold different numbers of tokens, and weigh by them."""
    rows = demonstrations(5)

    def gradient(rank: int, of: int) -> dict[str, torch.Tensor]:
        as_process(rank, of)
        trainer = offline(methods.sft().with_settings(batch=5, token_budget=40), rows)
        found: dict[str, torch.Tensor] = {}

        def step(rate: float) -> float:
            found.update({name: gradient.clone() for name, gradient in trainer.optimizer.gradients().items()})
            return 1.0

        trainer.optimizer.step = step  # type: ignore[method-assign]
        trainer.step(Collected(rows))
        return found

    whole, parts = gradient(0, 1), [gradient(rank, world) for rank in range(world)]
    batch = Batch.of(rows)
    tokens = [int(batch.lengths[share].sum()) for share in shares(batch, world)]
    off = 0.0
    for name, expected in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), expected, rtol=1e-4, atol=1e-6)
        means = [part[name] * sum(tokens) / n for part, n in zip(parts, tokens, strict=True)]
        off = max(off, float((torch.stack(means).mean(0) - expected).norm() / expected.norm()))
    assert off > 0.02


def test_what_each_process_saves_is_read_by_any_number(tmp_path: Path, as_process: Alone) -> None:
    """Three processes save 7 rows (3, 3, 1); what is read are any of them, or all, or none."""
    whole, bias = torch.arange(14.0).view(7, 2), torch.tensor(2.0)
    held = whole.split(3)
    for rank in range(3):
        as_process(rank, 3)
        file = tmp_path / ("tensors.safetensors" if rank == 0 else f"tensors-{rank}.safetensors")
        checkpoint._write(file, {"weight/w": Part(held[rank].clone(), 3 * rank, (7, 2)), "step/w": bias})
    files = sorted(tmp_path.iterdir())
    assert not any(b"\x80\x04\x95" in file.read_bytes() for file in files)
    tensors = checkpoint.Stored(files)
    assert set(tensors) == {"weight/w", "step/w"}
    assert tensors.shape("weight/w") == (7, 2)
    assert torch.equal(tensors["weight/w"], whole)
    assert torch.equal(tensors["step/w"], bias)
    for start in range(8):
        for stop in range(start, 8):
            assert torch.equal(tensors.rows("weight/w", start, stop), whole[start:stop]), (start, stop)


def test_a_checkpoint_that_lacks_a_part_is_incomplete(tmp_path: Path, as_process: Alone) -> None:
    as_process(0, 2)
    where = checkpoint.save(tmp_path, 1, {"w": Part(torch.ones(2, 2), 0, (3, 2))}, {})
    state: dict[str, Any] = json.loads((where / "state.json").read_text())
    assert checkpoint.complete(where)
    (where / "state.json").write_text(json.dumps({**state, "files": {"tensors-1.safetensors": 80}}))
    assert not checkpoint.complete(where)
    (where / "tensors-1.safetensors").write_bytes(b"x" * 79)
    assert not checkpoint.complete(where)
    (where / "tensors-1.safetensors").write_bytes(b"x" * 80)
    assert checkpoint.complete(where)


def test_each_process_needs_something_to_do(as_process: Alone) -> None:
    check_batch("sft", Settings(batch=1), 8)
    as_process(0, 4)
    check_batch("sft", Settings(batch=4), 8)
    check_batch("grpo", Settings(batch=8, minibatches=2), 8)
    with pytest.raises(PosttrainError, match=r"sft: batch is 3 of 8 rows and there are 4 processes.*4 rows or more"):
        check_batch("sft", Settings(batch=3), 8)
    with pytest.raises(PosttrainError, match=r"batch is 8 of 3 rows and there are 4 processes"):
        check_batch("sft", Settings(batch=8), 3)
    with pytest.raises(PosttrainError, match=r"batch is 7 of 9 rows in 2 minibatches .* 8 rows or more"):
        check_batch("grpo", Settings(batch=7, minibatches=2), 9)
    with pytest.raises(PosttrainError, match=r"dpo: batch is 2 of 12 rows and there are 4 processes"):
        offline(methods.dpo().with_settings(batch=2), pairs())


def test_a_step_is_seeded_anew_where_there_are_several(as_process: Alone) -> None:
    def draw(rank: int, step: int, salt: int) -> float:
        as_process(rank, 2)
        seed_step(3, step, salt)
        return float(torch.rand(()))

    assert draw(0, 1, 1) == draw(0, 1, 1)
    assert len({draw(0, 1, 1), draw(1, 1, 2), draw(0, 2, 1)}) == 3
    assert draw(0, 1, 0) == draw(1, 1, 0), "what all draw in the same way"
    as_process(0, 1)
    torch.manual_seed(5)
    expected = torch.rand(())
    torch.manual_seed(5)
    seed_step(3, 1)
    assert torch.equal(torch.rand(()), expected), "one process goes on with its generators"
