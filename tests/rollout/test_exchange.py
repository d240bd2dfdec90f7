"""Rollouts of several processes: who plays which prompt, and that all then have what one process would have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain import processes
from posttrain.processes import Processes
from posttrain.rollout import exchange
from posttrain.rollout.exchange import exchanged, packed, shares
from posttrain.rollout.rollout import play, rollout
from posttrain.trajectory import Group, Prompt, Sampling, Trajectory
from tiny_tasks import single_precision, step_context, tiny_policy


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), max_size=12), st.integers(1, 5))
def test_prompts_of_one_key_stay_together_in_their_order(keys: list[int], world: int) -> None:
    prompts = [Prompt(torch.ones(1, dtype=torch.int64), key=key) for key in keys]
    found = shares(prompts, world)
    assert len(found) == world
    assert sorted(i for share in found for i in share) == list(range(len(keys)))
    owners = [{keys[i] for i in share} for share in found]
    assert sum(map(len, owners)) == len(set(keys))
    assert all(share == sorted(share) for share in found)
    if len(set(keys)) == len(keys):
        assert max(map(len, found)) - min(map(len, found)) <= 1


def trajectory(length: int, **values: Any) -> Trajectory:
    draw = torch.Generator().manual_seed(length)
    logp, turn = torch.rand(length, generator=draw), torch.zeros(length, dtype=torch.int64)
    values |= {"finish": "length" if length % 2 else "stop", "text": f"ü{length}\n"}
    return Trajectory(torch.arange(length), torch.arange(length) > 1, logp, logp * 2, turn, **values)


def test_all_have_all_groups_in_the_order_of_the_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [Prompt(torch.arange(2), key=key) for key in (4, 4, 7, 9)]
    experts = torch.arange(3 * 2 * 2, dtype=torch.int16).view(3, 2, 2)
    groups = [
        Group([trajectory(4, experts=experts), trajectory(3)], prompts[0]),
        Group([trajectory(5), trajectory(6, token_reward=torch.ones(6))], prompts[1]),
        Group([trajectory(7), trajectory(8)], prompts[2]),
        Group([trajectory(9), trajectory(3)], prompts[3]),
    ]
    each = shares(prompts, 3)
    assert sorted(map(len, each)) == [1, 1, 2]
    sent = []
    for share in each:
        own = [groups[i] for i in share]
        sent.append(packed([t for g in own for t in g.trajectories], [len(g) for g in own]))
    monkeypatch.setitem(processes._state, "here", Processes(1, 3))
    monkeypatch.setattr(exchange, "gather", lambda arrays, facts: sent)
    found = exchanged([groups[i] for i in each[1]], prompts)
    assert [group.prompt is prompt for group, prompt in zip(found, prompts, strict=True)] == [True] * 4
    for group, expected in zip(found, groups, strict=True):
        for one, other in zip(group.trajectories, expected.trajectories, strict=True):
            assert (one.finish, one.text, one.rewards) == (other.finish, other.text, {})
            for name in exchange.ARRAYS:
                a, b = getattr(one, name), getattr(other, name)
                assert (a is None and b is None) or (a.dtype == b.dtype and torch.equal(a, b)), name


@pytest.mark.parametrize("world", [2, 3, 5])
def test_the_shares_together_are_what_one_process_draws(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also for a prompt that is asked for twice, whose second completions are others than the first."""
    with single_precision():
        context = step_context(tiny_policy())
        prompts = [Prompt(torch.tensor([3, 4 + key]), key=key) for key in (0, 1, 0, 2)]
        asked = (context.engine, prompts, 2, Sampling(max_tokens=6), 3)
        alone = play(*asked)
        sent = []
        for share in shares(prompts, world):
            own = play(asked[0], [prompts[i] for i in share], *asked[2:]) if share else []
            sent.append(packed([t for g in own for t in g.trajectories], [len(g) for g in own]))
        monkeypatch.setitem(processes._state, "here", Processes(0, world))
        monkeypatch.setattr(exchange, "gather", lambda arrays, facts: sent)
        found = rollout(*asked)
    texts = [[t.text for t in g.trajectories] for g in found]
    assert texts == [[t.text for t in g.trajectories] for g in alone]
    assert texts[0] != texts[2]
