"""Training on tasks one after the other: order, references of their own, and the matrix of accuracies."""

from __future__ import annotations

import pytest
import torch

from posttrain import methods
from posttrain.evaluation.task import Task
from posttrain.models.causal import CausalPolicy
from posttrain.training.continual import train_in_sequence
from posttrain.training.stage import train_stage
from posttrain.trajectory import PosttrainError
from resumable import small
from tiny_tasks import tiny_policy, tiny_task


def named(name: str) -> Task:
    task = tiny_task(6)
    task.name = name
    return task


def test_the_matrix_has_a_row_after_every_task() -> None:
    calls: list[tuple[str, int]] = []

    def accuracy(policy: CausalPolicy, task: Task) -> float:
        calls.append((task.name, len(calls) // 2))
        return len(calls) / 100

    tasks = {"first": named("a"), "second": named("b")}
    found = train_in_sequence(tiny_policy(), small(methods.rif_rft(samples=2, threshold=0.0)), tasks, accuracy=accuracy)
    assert calls == [("a", 0), ("b", 0), ("a", 1), ("b", 1), ("a", 2), ("b", 2)]
    assert found.accuracies.tasks == ("first", "second")
    assert found.accuracies.before is not None
    assert found.accuracies.before.tolist() == [0.01, 0.02]
    assert found.accuracies.after.tolist() == [[0.03, 0.04], [0.05, 0.06]]
    assert found.accuracies.forgetting == pytest.approx(0.02)
    assert [stage.rollouts for stage in found.stages] == [6 * 2 + 4 * 3 * 4] * 2


def test_it_is_one_stage_after_another() -> None:
    by_task = {"a": small(methods.sft()), "b": small(methods.dft())}
    found = train_in_sequence(tiny_policy(), by_task, {"a": named("a"), "b": named("b")}, seed=2, limit=1, samples=2)
    policy = tiny_policy()
    for i, method in enumerate(by_task.values()):
        policy = train_stage(policy, method, named("x"), seed=2 * 1000 + i).policy
    mine = dict(found.policy.model.named_parameters())
    assert all(torch.equal(p, mine[name]) for name, p in policy.model.named_parameters())
    assert 0 <= found.accuracies.average <= 1


def test_what_cannot_be() -> None:
    with pytest.raises(PosttrainError, match="needs tasks"):
        train_in_sequence(tiny_policy(), methods.sft(), {})
    with pytest.raises(PosttrainError, match="no method for task 'b'"):
        train_in_sequence(tiny_policy(), {"a": methods.sft()}, {"a": named("a"), "b": named("b")})
