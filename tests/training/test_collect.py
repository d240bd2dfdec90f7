"""Where a step's groups come from: rows in the sampler's order, rollouts on prompts, again where groups are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from posttrain import methods
from posttrain.data.sampler import Shuffled, Undecided
from posttrain.reward.reward import reward_from
from posttrain.training.collect import MAX_ROUNDS, Offline, Online, summarise
from posttrain.training.settings import Settings
from posttrain.trajectory import Completion, Group, PosttrainError, Prompt, Sampling, Trajectory
from tiny_training import demonstrations, letters, online, prompts


class Scripted:
    """An engine whose completions say their prompt's number and how often it was asked before."""

    def __init__(self) -> None:
        self.calls: list[tuple[list[int], int, Sampling, int]] = []

    def generate(
        self, prompts: Sequence[Prompt], samples: int, sampling: Sampling, seed: int, progress: Any = None
    ) -> list[list[Completion]]:
        self.calls.append(([p.key for p in prompts], samples, sampling, seed))
        token, logp = torch.tensor([5]), torch.tensor([-1.0])
        return [
            [Completion(token, logp, logp, "length" if s else "stop", f"{p.key}:{s}") for s in range(samples)]
            for p in prompts
        ]


def source(reward: Any, sampler: Shuffled, **settings: Any) -> tuple[Online, Scripted]:
    engine = Scripted()
    chosen = Settings(**{"batch": 3, "group": 2, "max_tokens": 4, **settings})
    return Online(prompts(8), sampler, chosen, engine, reward_from(reward), seed=7), engine


def test_offline_takes_rows_in_the_samplers_order() -> None:
    groups = demonstrations(10)
    found = Offline(groups, Shuffled(range(10), 4), Settings(batch=4))
    order = Shuffled(range(10), 4).take(12)
    places = {id(group): i for i, group in enumerate(groups)}
    for step in range(3):
        collected = found.collect(step)
        assert [places[id(g)] for g in collected.groups] == order[4 * step : 4 * step + 4]
        assert collected.metrics["length"] == sum(g.trajectories[0].actions for g in collected.groups) / 4
    assert found.rows == 10
    assert len(Offline(groups, Shuffled(range(10)), Settings(batch=99)).collect(0).groups) == 10


def test_online_plays_prompts_and_scores_them() -> None:
    found, engine = source(lambda completion, prompt: float(completion.endswith("1")), Shuffled(range(8), 1), top_p=0.9)
    collected = found.collect(5)
    (keys, samples, sampling, seed) = engine.calls[0]
    assert keys == [found.prompts[i].key for i in Shuffled(range(8), 1).take(3)]
    assert (samples, sampling, seed) == (2, Sampling(4, 1.0, 0, 0.9, 0.0), (7 * 1_000_003 + 5) * MAX_ROUNDS)
    assert [[t.reward for t in g.trajectories] for g in collected.groups] == [[0, 1]] * 3
    expected = {"reward": 0.5, "length": 1, "truncated": 0.5, "undecided": 1}
    assert {k: collected.metrics[k] for k in expected} == expected
    assert "admitted" not in collected.metrics


def test_every_step_and_round_has_a_seed_of_its_own() -> None:
    found, engine = source(lambda completion, prompt: 0.0, Undecided(range(8)), batch=8)
    for step in range(20):
        found.collect(step)
    seeds = [call[3] for call in engine.calls]
    assert len(seeds) == len(set(seeds)) == 20 * MAX_ROUNDS


def test_refused_groups_are_drawn_again() -> None:
    """Rewards differ on even prompts only."""
    found, engine = source(
        lambda completion, prompt: float(completion[-1]) * (prompt.key % 2 == 0), Undecided(range(8), 2)
    )
    order = Shuffled(range(8), 2).take(8)
    collected = found.collect(0)
    assert [g.prompt.key % 2 for g in collected.groups if g.prompt is not None] == [0, 0, 0]
    drawn = [key for call in engine.calls for key in call[0]]
    assert drawn == order[: len(drawn)]
    assert len(engine.calls) > 1
    assert len(engine.calls[1][0]) == sum(key % 2 for key in engine.calls[0][0]), "only as many as are missing"
    assert collected.metrics["admitted"] == 3 / len(drawn)
    assert collected.metrics["undecided"] == 3 / len(drawn)


def test_where_nothing_is_admitted_the_step_still_has_groups() -> None:
    found, engine = source(lambda completion, prompt: 1.0, Undecided(range(8)))
    collected = found.collect(0)
    assert len(engine.calls) == MAX_ROUNDS
    assert len(collected.groups) == 3
    assert collected.metrics["admitted"] == 0
    assert collected.metrics["undecided"] == 0


def test_a_method_that_draws_again_trains_on_the_undecided() -> None:
    settings = {"batch": 3, "group": 4, "max_tokens": 6, "steps": 1, "learning_rate": 1e-3}
    method = methods.grpo().replace(sampler=methods.dapo().sampler).with_settings(**settings)
    trainer = online(method, reward=lambda c, p: letters(c, p) * (p.key % 2), sampler=method.sampler(range(8), 0))
    collected = trainer.source.collect(0)
    assert all(g.prompt is not None and g.prompt.key % 2 for g in collected.groups)
    assert trainer.step(collected)["grad_norm"] > 0


def test_a_rollout_must_return_something() -> None:
    with pytest.raises(PosttrainError, match="returned no completion"):
        summarise([Group([])])


def test_components_are_reported() -> None:
    one = Trajectory(torch.tensor([1, 2]), torch.tensor([False, True]), reward=1.5, rewards={"a": 1.0, "b": 0.5})
    two = Trajectory(torch.tensor([1, 2]), torch.tensor([False, True]), reward=0.5, rewards={"a": 0.0, "b": 0.5})
    metrics = summarise([Group([one, two])])
    assert (metrics["reward"], metrics["reward/a"], metrics["reward/b"]) == (1.0, 0.5, 0.5)
