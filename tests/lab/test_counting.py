"""Counting letters, in three formats."""

from __future__ import annotations

import re

import pytest
from scoring import correct

from posttrain.evaluation.task import TaskItem
from posttrain.lab.worlds.counting import counting
from posttrain.lab.worlds.world import is_heldout
from posttrain.trajectory import PosttrainError


def counted(question: str) -> str:
    letter, _, text = question.partition(" in ")
    return str(text.count(letter))


def test_open_questions():
    task = counting(train=60, heldout=20)
    for item in (*task.train, *task.heldout):
        assert item.answer == counted(item.prompt)
        assert 5 <= item.meta["length"] == len(item.prompt) - len("a in ") <= 8
        assert correct(task, item, item.answer)
        assert not correct(task, item, item.answer + "1")


def test_judgements_and_choices_are_about_strings_that_are_not_held_out():
    task = counting(form="judge", train=100, heldout=20)
    for item in (*task.train, *task.heldout):
        question, proposed = re.fullmatch(r"(. in \w+)=(\d)\?", item.prompt).groups()
        assert item.answer == ("yes" if proposed == counted(question) else "no")
        assert not is_heldout(TaskItem(question))
        assert correct(task, item, item.answer)
        assert not correct(task, item, {"yes": "no", "no": "yes"}[item.answer])
    assert 25 < sum(item.answer == "yes" for item in task.train) < 75
    task = counting(form="choice", train=60, heldout=10)
    for item in (*task.train, *task.heldout):
        question, offered = re.fullmatch(r"(. in \w+) (A\. \d B\. \d C\. \d)", item.prompt).groups()
        values = dict(zip("ABC", re.findall(r"\d", offered), strict=True))
        assert values[item.answer] == counted(question)
        assert len(set(values.values())) == 3
        assert not is_heldout(TaskItem(question))
        assert correct(task, item, item.answer)


@pytest.mark.parametrize("options", [{"form": "quiz"}, {"length": (1, 2)}, {"alphabet": "a"}])
def test_what_cannot_be_made(options):
    with pytest.raises(PosttrainError, match="counting"):
        counting(**options)
