"""Learning tasks one after the other: what reinforcement forgets, filtered problems, and replay."""

from __future__ import annotations

from dataclasses import replace

from posttrain import methods
from posttrain.evaluation.task import Task, TaskItem
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.engine_choice import engine_for
from posttrain.rollout.rollout import rollout
from posttrain.studies.arms import in_lab, shortened
from posttrain.studies.study import Arm, Measured
from posttrain.training.continual import train_in_sequence
from posttrain.training.method import Method, Pipeline
from posttrain.training.scoring import sequence_scores

TAGS = ("rev", "srt", "add")
FOREIGN = 16  # tokens that the longest answer takes in the foreign style


def in_foreign_style(tag: str) -> Task:
    """One of the tasks of `three-tasks`, with solutions that are right and not as the model would write them."""
    from posttrain import lab

    def rewritten(item: TaskItem) -> TaskItem:
        said = "ans: " + " ".join(str(item.answer)) if tag == "add" else f"answer: {item.answer}"
        return replace(item, solution=said)

    task = lab.task("three-tasks", only=tag, train=600, heldout=150)
    sampling = replace(task.sampling, max_tokens=FOREIGN)
    return replace(task, train=[rewritten(item) for item in task.train], sampling=sampling)


def in_sequence(seed: int, quick: bool, *, method: Method | Pipeline, model: str) -> Measured:
    """Train on the three tasks one after the other.

    `forgetting`: mean change of the first two tasks' accuracies since their own training; `learned`: mean accuracy on
    each right after it; `last`: on the last task, at the end; `average`: over all three, at the end. `drift`: mean
    KL(first policy || last policy) a token, in nats, on the first policy's own answers to the first two tasks.
    """
    from posttrain import lab

    policy = lab.model("three-tasks")
    first = policy.frozen_copy()
    tasks = {tag: in_foreign_style(tag) for tag in TAGS}
    found = train_in_sequence(
        policy, shortened(method) if quick else method, tasks, seed=seed, samples=4, limit=8 if quick else 120
    )
    accuracies, stages = found.accuracies, found.stages
    old = [drift(first, found.policy, tasks[tag], 4 if quick else 64) for tag in TAGS[:-1]]
    return Measured(
        {
            "forgetting": accuracies.forgetting,
            "learned": accuracies.learned,
            "last": float(accuracies.after[-1, -1]),
            "average": accuracies.average,
            "drift": sum(old) / len(old),
        },
        {tag: [{"step": i, "value": a} for i, a in enumerate(accuracies.curve(tag))] for tag in TAGS},
        sum(s.rollouts for s in stages),
        sum(s.seconds for s in stages),
        sum(s.tokens for s in stages),
    )


def drift(first: CausalPolicy, last: CausalPolicy, task: Task, prompts: int) -> float:
    """KL(first || last) a token in nats, by samples of the first policy."""
    asked = task.prompts(first.tokenizer, "heldout", prompts)
    drawn = [t for g in rollout(engine_for(first, rows=256), asked, 4, task.sampling, 0) for t in g.trajectories]
    before, after = sequence_scores(first, drawn), sequence_scores(last, drawn)
    return sum(a - b for a, b in zip(before, after, strict=True)) / sum(t.actions for t in drawn)


def _in_sequence(method: Method | Pipeline) -> Arm:
    from posttrain import lab

    arguments = {"method": method, "model": lab.preset("three-tasks").key}
    return Arm(in_sequence, arguments, (train_in_sequence,))
