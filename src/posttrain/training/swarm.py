"""A swarm: several policies trained side by side, round by round, that share their rollouts as text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from posttrain.evaluation.task import Task
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.pool.cluster import Cluster
from posttrain.rollout.strategies.swarm import Pool
from posttrain.training.method import Method
from posttrain.training.stage import Trained
from posttrain.training.swarm_cluster import clustered_swarm
from posttrain.training.swarm_node import Between, Node, seats


def swarm(
    policies: Sequence[CausalPolicy],
    method: Method,
    tasks: Task | Sequence[Task],
    *,
    seed: int = 0,
    between: Between | None = None,
    cluster: Cluster | None = None,
) -> list[Trained]:
    """Train every policy in place on its task; returns one record a node, in their order.

    A round is one optimizer step of every node. All nodes are in this process and take turns, or each is a process of
    its own on a Ray cluster; since a node sees only what others published in earlier rounds, the result is the same.
    Nothing is shared between the nodes but the pool's text: architectures, tokenizers and tasks may differ.

    Args:
        method: its rollouts are `Shared` (`methods.sapo()`). tasks: one for all nodes, or one each.
        seed: node n trains as `train_stage(..., seed=seed + n)` would.
        between: called after every round with its number (from 1) and the policies.
        cluster: where the nodes are, with `cpus` and `gpus` of each; None for this process (see `swarm_cluster`).

    Raises:
        PosttrainError: no node, tasks that are not one for all or one each, a method whose rollouts are not shared, or
            one that trains adapters.
    """
    if cluster is not None:
        return clustered_swarm(policies, seats(policies, method, tasks, seed), cluster, between)
    pool = Pool()
    nodes = [
        Node(policy, seat, pool) for policy, seat in zip(policies, seats(policies, method, tasks, seed), strict=True)
    ]
    while sum(node.round() for node in nodes):  # not any(): every node has its turn
        if between is not None:
            between(max(len(node.found.metrics) for node in nodes), policies)
    for node in nodes:
        node.end()
    return [node.found for node in nodes]


def cumulative_reward(nodes: Sequence[Trained]) -> float:
    """The mean reward of each node's own rollouts, summed over rounds and nodes."""
    return math.fsum(metrics["reward"] for node in nodes for metrics in node.metrics)
