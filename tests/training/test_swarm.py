"""A swarm of nodes in one process: independence without sharing, and what sharing brings."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain import methods
from posttrain.models.causal import CausalPolicy
from posttrain.training.method import Method
from posttrain.training.stage import train_stage
from posttrain.training.swarm import cumulative_reward, swarm
from posttrain.trajectory import PosttrainError
from tiny_tasks import TOKENIZER, tiny_policy, tiny_task
from tiny_training import make_dropout_model, same, weights


def sapo(own: int, foreign: int, **settings: Any) -> Method:
    short = {"steps": 3, "group": 3, "learning_rate": 1e-3, "max_tokens": 6, **settings}
    return methods.sapo(own, foreign).with_settings(**short)


@pytest.mark.limit("sapo")
@pytest.mark.parametrize("dropout", [False, True])
def test_without_sharing_the_nodes_train_as_if_alone(dropout: bool) -> None:
    # card 053 (a), bit for bit; also where every node draws its dropout
    def policy(seed: int) -> CausalPolicy:
        return CausalPolicy(make_dropout_model(seed), TOKENIZER) if dropout else tiny_policy(seed)

    nodes = swarm([policy(0), policy(1)], sapo(2, 0), tiny_task(), seed=4)
    for n, node in enumerate(nodes):
        alone = train_stage(policy(n), sapo(2, 0), tiny_task(), seed=4 + n)
        assert same(weights(node.policy), weights(alone.policy))
        assert [m["reward"] for m in node.metrics] == [m["reward"] for m in alone.metrics]
        assert (node.steps, node.rollouts, node.tokens) == (3, alone.rollouts, alone.tokens)


def test_nodes_train_on_what_others_published_in_the_round_before() -> None:
    rounds: list[int] = []
    policies = [tiny_policy(0), tiny_policy(1)]
    nodes = swarm(policies, sapo(1, 1), tiny_task(), between=lambda number, _: rounds.append(number))
    assert rounds == [1, 2, 3]
    assert [[m["foreign_groups"] for m in node.metrics] for node in nodes] == [[0, 1, 1], [0, 1, 1]]
    other = swarm([tiny_policy(0), tiny_policy(2)], sapo(1, 1), tiny_task())
    assert nodes[0].metrics[0]["loss"] == other[0].metrics[0]["loss"]
    assert not same(weights(nodes[0].policy), weights(other[0].policy))  # it learned from another neighbour
    assert cumulative_reward(nodes) == pytest.approx(sum(m["reward"] for node in nodes for m in node.metrics))
    assert not nodes[0].policy.model.training


def test_runs_are_repeatable_and_do_not_share_a_pool() -> None:
    method = sapo(1, 1)
    first, second = (swarm([tiny_policy(0), tiny_policy(1)], method, tiny_task()) for _ in range(2))
    assert all(same(weights(a.policy), weights(b.policy)) for a, b in zip(first, second, strict=True))


def test_nodes_may_differ() -> None:
    wide = tiny_policy(1, hidden_size=64)
    nodes = swarm([tiny_policy(0), wide], sapo(1, 1), [tiny_task(6), tiny_task(4)])
    assert [m["foreign_groups"] for m in nodes[1].metrics] == [0, 1, 1]


def test_refusals() -> None:
    with pytest.raises(PosttrainError, match="2 policies got 1 tasks"):
        swarm([tiny_policy(0), tiny_policy(1)], sapo(1, 1), [tiny_task()])
    with pytest.raises(PosttrainError, match="0 policies"):
        swarm([], sapo(1, 1), tiny_task())
    with pytest.raises(PosttrainError, match="grpo: its rollouts are Plain"):
        swarm([tiny_policy(0)], methods.grpo(), tiny_task())
    with pytest.raises(PosttrainError, match="lora: 0"):
        swarm([tiny_policy(0)], sapo(1, 1, lora=4), tiny_task())


def test_a_node_stops_at_its_limit() -> None:
    assert [node.steps for node in swarm([tiny_policy(0)], sapo(1, 1, rollout_limit=4), tiny_task())] == [1]
