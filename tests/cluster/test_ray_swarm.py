"""A swarm whose nodes are processes: the same as in one process, also where a node is killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ray_cluster import ROOM, cluster, hang_once, killing  # noqa: F401 - a fixture

from posttrain import methods
from posttrain.training.method import Method
from posttrain.training.swarm import swarm
from posttrain.trajectory import PosttrainError, Prompt
from tiny_tasks import letters, tiny_policy, tiny_task
from tiny_training import same, weights

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]


def sapo(own: int, foreign: int, **settings: Any) -> Method:
    short = {"steps": 3, "group": 3, "learning_rate": 1e-3, "max_tokens": 6, **settings}
    return methods.sapo(own, foreign).with_settings(**short)


class Mortal:
    """Letters; at its 9th completion, after the first round, its process hangs once until it is killed."""

    def __init__(self, file: str) -> None:
        self.file, self.calls = file, 0

    def __call__(self, completion: str, prompt: Prompt) -> float:
        self.calls += 1
        if self.calls == 9:
            hang_once(Path(self.file))
        return letters(completion, prompt)


def test_nodes_on_a_cluster_are_those_of_one_process(tmp_path: Path) -> None:
    """Bit for bit: one node is killed after it has been through some rounds, and comes to the same."""
    file = tmp_path / "pid"
    tasks = [tiny_task(6), tiny_task(4)]
    expected = swarm([tiny_policy(0), tiny_policy(1, hidden_size=64)], sapo(1, 1), tasks, seed=4)
    policies = [tiny_policy(0), tiny_policy(1, hidden_size=64)]
    given = [tiny_task(6), tiny_task(4, reward=Mortal(str(file)))]
    rounds: list[int] = []
    with killing(file):
        found = swarm(
            policies, sapo(1, 1), given, seed=4, cluster=ROOM, between=lambda number, _: rounds.append(number)
        )
    assert rounds == [1, 2, 3]
    for one, other, policy in zip(found, expected, policies, strict=True):
        assert one.policy is policy
        assert same(weights(one.policy), weights(other.policy))
        for name in ("reward", "foreign_groups", "loss", "grad_norm"):
            assert [m[name] for m in one.metrics] == [m[name] for m in other.metrics]
        assert (one.steps, one.rollouts, one.tokens) == (other.steps, other.rollouts, other.tokens)
    assert sum(m["foreign_groups"] for node in found for m in node.metrics) > 0


def test_refusals() -> None:
    with pytest.raises(PosttrainError, match="grpo: its rollouts are Plain"):
        swarm([tiny_policy(0)], methods.grpo(), tiny_task(), cluster=ROOM)
