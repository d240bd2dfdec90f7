"""A node of a swarm: a policy with its trainer, and the seat that says what it trains by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from posttrain.evaluation.task import Task
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.strategies.swarm import Pool, Shared
from posttrain.training.loop import Trainer
from posttrain.training.method import Method
from posttrain.training.stage import Trained, source_for
from posttrain.trajectory import PosttrainError

Between = Callable[[int, Sequence[CausalPolicy]], None]


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
