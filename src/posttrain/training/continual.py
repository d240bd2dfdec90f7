"""Training on tasks one after the other, with the accuracy on all of them after each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from posttrain.evaluation.evaluate import evaluate
from posttrain.evaluation.forgetting import Continual
from posttrain.evaluation.task import Task
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.engine_choice import engine_for
from posttrain.training.method import Method, Pipeline
from posttrain.training.stage import Trained, train_stage
from posttrain.trajectory import PosttrainError

Accuracy = Callable[[CausalPolicy, Task], float]


@dataclass
class Sequential:
    """What came of it: the policy, the accuracies, and the record of each training in order."""

    policy: CausalPolicy
    accuracies: Continual
    stages: list[Trained] = field(default_factory=list)


def train_in_sequence(
    policy: CausalPolicy,
    method: Method | Pipeline | Mapping[str, Method | Pipeline],
    tasks: Mapping[str, Task],
    *,
    seed: int = 0,
    accuracy: Accuracy | None = None,
    samples: int = 4,
    limit: int | None = None,
) -> Sequential:
    """Train on one task after the other, without replay; each training starts from where the one before ended.

    Every training has an optimizer and, where the method wants one, a reference policy of its own, made at its start.

    Args:
        policy: trained in place. method: for every task, or one for each by its name.
        accuracy: how a task's accuracy is measured; None takes the mean over `samples` completions, at temperature 1,
            of each of the first `limit` held-out problems.
    """
    if not tasks:
        raise PosttrainError("training in sequence needs tasks; got none")
    by_task = method if isinstance(method, Mapping) else dict.fromkeys(tasks, method)
    missing = [name for name in tasks if name not in by_task]
    if missing:
        raise PosttrainError(f"training in sequence: no method for task {missing[0]!r}")

    def measured(now: CausalPolicy) -> list[float]:
        if accuracy is not None:
            return [accuracy(now, task) for task in tasks.values()]
        engine = engine_for(now, rows=256)
        found = (evaluate(engine, now.tokenizer, task, samples=samples, limit=limit) for task in tasks.values())
        return [float(each.correct.mean()) for each in found]

    before, rows, stages = measured(policy), [], []
    for place, (name, task) in enumerate(tasks.items()):
        trained = train_stage(policy, by_task[name], task, seed=seed * 1_000 + place)
        policy = trained.policy
        stages.append(trained)
        rows.append(measured(policy))
    return Sequential(policy, Continual.of(list(tasks), rows, before), stages)
