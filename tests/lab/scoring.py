"""Scores of completions of a lab's task, by its own reward."""

from __future__ import annotations

import torch

from posttrain.evaluation.task import Task, TaskItem
from posttrain.reward.reward import Score
from posttrain.trajectory import Prompt


def score(task: Task, item: TaskItem, completion: str) -> Score:
    prompt = Prompt(torch.ones(1, dtype=torch.int64), text=str(item.prompt), answer=item.answer, meta=item.meta)
    found = task.reward.score(prompt, completion, tokens=len(completion) + 1, finish="stop")
    assert not found.errors, found.errors
    return found


def correct(task: Task, item: TaskItem, completion: str) -> bool:
    return task.correct(score(task, item, completion))


def problem(task: Task, prompt: str, answer: object, **meta: object) -> TaskItem:
    """A problem written by hand, for the verifier of `task`."""
    return TaskItem(prompt, answer, {"domain": task.name, **meta})
