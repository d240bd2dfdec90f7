"""Mixtures: each problem is scored as its own task scores it."""

from __future__ import annotations

import pytest
import torch
from scoring import correct, score

from posttrain.evaluation.task import Task, TaskItem
from posttrain.lab.worlds import arithmetic, formats, mix, rewriting, turns, words
from posttrain.reward.reward import Reward
from posttrain.trajectory import PosttrainError, Prompt


def test_a_mixture_scores_as_the_parts_do():
    parts = {
        "words": words(train=12, heldout=4, process=0.0),
        "turned": rewriting(train=12, heldout=4),
        "work": arithmetic(style="worked", train=12, heldout=4),
    }
    task = mix(parts)
    assert len(task.train) == 36
    assert len(task.heldout) == 12
    for item in task.train:
        own = parts[item.meta["domain"]]
        for text in (str(item.solution), f"{item.solution}1", "", str(item.answer)):
            assert score(task, item, text).total == score(own, item, text).total
            assert correct(task, item, text) == correct(own, item, text)
    assert set(task.reward.components) == {"correct", "answer", "process", "steps", "verified"}
    turned = next(i for i in task.train if i.meta["domain"] == "turned")
    assert score(task, turned, str(turned.answer)).parts == {
        "correct": 1.0, "answer": 1.0, "process": 0.0, "steps": 0.0, "verified": 0.0,
    }  # fmt: skip


def test_right_is_what_the_own_task_calls_right():
    task = mix({"a": formats(train=6, heldout=2)})
    item = task.train[0]
    assert correct(task, item, str(item.solution))
    assert not correct(task, item, item.meta["letters"])  # the letters without the constraints: half the reward


def test_weights_of_one_name_must_agree():
    with pytest.raises(PosttrainError, match="answer weighs"):
        mix({"a": formats(train=2, heldout=1), "b": rewriting(train=2, heldout=1)})


def test_a_tag_stands_in_front_of_prompts_and_in_the_corpus():
    task = mix({"rev": rewriting(train=10, heldout=5)}, tag=True)
    plain = rewriting(train=0, heldout=2000)
    assert all(str(i.prompt).startswith("rev: ") for i in (*task.train, *task.heldout, *task.corpus(20)))
    heldout = {f"rev: {i.prompt}" for i in plain.heldout}
    assert {str(i.prompt) for i in task.heldout} <= heldout
    assert not heldout & {str(i.prompt) for i in task.corpus(500)}


def test_a_failing_part_is_counted_as_an_error():
    def broken(completion, prompt):
        raise ValueError("no")

    task = mix({"b": Task("b", [TaskItem("x")], [TaskItem("y")], Reward({"answer": (broken, 1.0)}))})
    prompt = Prompt(torch.ones(1, dtype=torch.int64), meta=task.train[0].meta)
    assert set(task.reward.score(prompt, "z", tokens=1, finish="stop").errors) == {"answer", "correct"}
    assert task.draw is None


def test_what_cannot_be_mixed():
    with pytest.raises(PosttrainError, match="several turns"):
        mix({"t": turns(train=4, heldout=2)})
    with pytest.raises(PosttrainError, match="no task"):
        mix({})
