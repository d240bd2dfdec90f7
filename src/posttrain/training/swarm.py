"""A swarm: several policies trained side by side, round by round, that share their rollouts as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from posttrain.evaluation.task import Task
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.pool.cluster import Cluster
from posttrain.rollout.strategies.swarm import Pool, Shared
from posttrain.training.loop import Trainer
from posttrain.training.method import Method
from posttrain.training.stage import Trained, source_for
from posttrain.trajectory import PosttrainError

Between = Callable[[int, Sequence[CausalPolicy]], None]


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
        from posttrain.training.swarm_cluster import clustered_swarm

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


@dataclass(frozen=True)
class Seat:
    """What a node trains by: its number, the method, its task, and the seed of its stage."""

    node: int
    method: Method
    task: Task
    seed: int


def seats(policies: Sequence[CausalPolicy], method: Method, tasks: Task | Sequence[Task], seed: int) -> list[Seat]:
    """The seats of a swarm, checked."""
    each = [tasks] * len(policies) if isinstance(tasks, Task) else list(tasks)
    shared = method.rollouts
    if not policies or len(each) != len(policies):
        raise PosttrainError(
            f"a swarm of {len(policies)} policies got {len(each)} tasks; expected one for all or one each"
        )
    if not isinstance(shared, Shared):
        raise PosttrainError(
            f"{method.name}: its rollouts are {type(shared).__name__}; a swarm needs a method like sapo"
        )
    if method.settings.lora:
        raise PosttrainError(f"a swarm trains whole models; set lora: 0 (it is {method.settings.lora})")
    quiet = method.with_settings(evaluate_every=0, patience=0)
    return [Seat(n, quiet, task, (seed + n) * 1_000) for n, task in enumerate(each)]


def cumulative_reward(nodes: Sequence[Trained]) -> float:
    """The mean reward of each node's own rollouts, summed over rounds and nodes."""
    return math.fsum(metrics["reward"] for node in nodes for metrics in node.metrics)


class Node:
    """One policy, its trainer and its generator of random numbers."""

    def __init__(self, policy: CausalPolicy, seat: Seat, pool: Pool) -> None:
        from transformers import set_seed

        shared, seed = seat.method.rollouts, seat.seed
        assert isinstance(shared, Shared)
        method = seat.method.replace(rollouts=replace(shared, pool=pool, node=seat.node))
        set_seed(seed % (1 << 32))
        policy.model.requires_grad_(True)
        self.trainer = Trainer(policy, method, source_for(policy, method, seat.task, seed=seed), seed=seed)
        self.found = Trained(policy)
        self.random = torch.get_rng_state()  # dropout is drawn from it, and must not depend on the other nodes

    def round(self) -> bool:
        """One step, unless the stage is over; says whether there was one."""
        trainer = self.trainer
        if trainer.progress.step >= trainer.total or trainer.spent():
            return False
        torch.set_rng_state(self.random)
        trainer.policy.model.train()
        self.found.metrics.append(trainer.advance())
        self.random = torch.get_rng_state()
        return True

    def end(self) -> None:
        done, found = self.trainer.progress, self.found
        found.seconds, found.tokens, found.rollouts, found.steps = done.seconds, done.tokens, done.rollouts, done.step
        self.trainer.policy.model.eval()
        self.trainer.optimizer.close()
