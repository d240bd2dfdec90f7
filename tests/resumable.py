"""Runs of a method on a task in memory, whole or stopped and resumed, with the weights that they end in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from posttrain.evaluation.task import Task
from posttrain.models.causal import CausalPolicy
from posttrain.training.loop import Trainer
from posttrain.training.method import Method
from posttrain.training.stage import source_for

Weights = dict[str, Tensor]
SMALL = {"steps": 4, "batch": 3, "group": 4, "max_tokens": 6, "learning_rate": 1e-3, "checkpoint_every": 0}


def small(method: Method, **settings: object) -> Method:
    """A method with settings for a few quick steps."""
    return method.with_settings(**{**SMALL, **settings})


def trainer(method: Method, task: Task, policy: CausalPolicy, folder: Path | None = None, after: int = 99) -> Trainer:
    """A stage of its own; it stops with a checkpoint once it made `after` steps."""
    made = Trainer(policy, method, source_for(policy, method, task, seed=0), folder=folder)
    made.stop = lambda: made.progress.step >= after
    return made


def weights(policy: CausalPolicy) -> Weights:
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def run(method: Method, task: Task, make: Callable[[], CausalPolicy]) -> Weights:
    policy = make()
    assert trainer(method, task, policy).run().status == "finished"
    return weights(policy)


def stopped_and_resumed(
    method: Method, task: Task, make: Callable[[], CausalPolicy], folder: Path, after: int = 2
) -> Weights:
    first, second = make(), make()
    assert trainer(method, task, first, folder, after).run().status == "interrupted"
    assert trainer(method, task, second, folder).run().status == "finished"
    return weights(second)
