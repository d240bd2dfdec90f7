"""A swarm whose nodes are processes on a Ray cluster.

What passes between them is text: after a round each node hands over what it published, and gets what the others did.
A node that dies is replaced by one that begins anew and does the rounds so far again, with what it was given in each:
so it comes to the same weights, and the others' rollouts need no second drawing.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from posttrain.models.causal import CausalPolicy
from posttrain.rollout.pool.actor import pack, unpack
from posttrain.rollout.pool.cluster import Cluster, joined, ray_package
from posttrain.rollout.pool.engine import on_cpu
from posttrain.rollout.pool.workers import Workers
from posttrain.rollout.strategies.swarm import Pool, Record
from posttrain.training.stage import Trained
from posttrain.training.swarm_node import Between, Node, Seat

Published = dict[int, list[Record]]  # by node


@dataclass(frozen=True)
class Told:
    """What a node says after a round: whether there was one, what it published, and its weights where asked for."""

    went: bool
    published: list[Record]
    weights: NDArray[np.uint8] | None


class SwarmNode:
    """What runs in a node's process. `done`: rounds that it has been through."""

    def __init__(self, policy: CausalPolicy, seat: Seat, threads: int) -> None:
        torch.set_num_threads(threads)
        if torch.cuda.is_available():  # the cluster gave this node a GPU
            policy.model.to("cuda")
        self.policy, self.seat, self.pool = policy, seat, Pool()
        self.node = Node(policy, seat, self.pool)
        self.done = 0
        self.went = True

    def ready(self) -> int:
        """The number of the process."""
        return os.getpid()

    def advance(self, history: Sequence[Any], weights: bool) -> Told:
        """Go through the rounds that are new. history: for each round a reference to what was published before it."""
        ray = ray_package()
        while self.done < len(history):
            for other, records in ray.get(history[self.done]).items():
                if other != self.seat.node:
                    self.pool.publish(other, self.done - 1, records)
            self.went = self.node.round()
            self.done += 1
        published = self.pool.records.get(self.seat.node, {}).get(self.done - 1, [])
        return Told(self.went, published, pack(self.policy) if weights else None)

    def end(self, history: Sequence[Any]) -> tuple[Trained, NDArray[np.uint8]]:
        """The record, without the policy, and the weights."""
        self.advance(history, weights=False)
        packed = pack(self.policy)
        self.node.end()
        return replace(self.node.found, policy=None), packed  # type: ignore[arg-type]


def clustered_swarm(
    policies: Sequence[CausalPolicy], seats: Sequence[Seat], cluster: Cluster, between: Between | None
) -> list[Trained]:
    """`swarm` on a cluster: `cluster.workers` does not matter, there is a process a node."""
    room = replace(cluster, workers=len(policies), reward_workers=0)
    with joined(room), ExitStack() as ending:
        nodes = []
        for policy, seat in zip(policies, seats, strict=True):
            nodes.append(_workers(policy, seat, room))
            ending.callback(nodes[-1].close)
        history: list[Any] = [ray_package().put({})]
        while True:
            told = _all(nodes, partial(_advance, list(history), between is not None))
            if not any(t.went for t in told):
                break
            if between is not None:
                for policy, t in zip(policies, told, strict=True):
                    unpack(policy, t.weights)
                between(len(history), policies)
            published: Published = {s.node: t.published for s, t in zip(seats, told, strict=True) if t.published}
            history.append(ray_package().put(published))
        found = []
        for policy, (trained, weights) in zip(policies, _all(nodes, partial(_end, list(history))), strict=True):
            unpack(policy, weights)
            policy.model.eval()
            found.append(replace(trained, policy=policy))
        return found


def _workers(policy: CausalPolicy, seat: Seat, cluster: Cluster) -> Workers:
    """The one worker of a node, and whoever takes its place."""
    policy.model.requires_grad_(True)
    ray = ray_package()
    actor = ray.remote(SwarmNode).options(num_cpus=cluster.cpus, num_gpus=cluster.gpus, max_restarts=0)
    start, seated = ray.put(on_cpu(policy)), ray.put(seat)
    return Workers(lambda: actor.remote(start, seated, cluster.cpus), 1, f"swarm node {seat.node}")


def _all(nodes: Sequence[Workers], call: Any) -> list[Any]:
    """All nodes at the same time."""
    return [future.result() for future in [node.submit(call) for node in nodes]]


def _advance(history: list[Any], weights: bool, node: Any) -> Any:
    return node.advance.remote(history, weights)


def _end(history: list[Any], node: Any) -> Any:
    return node.end.remote(history)
