"""Reversing, sorting, and the three tagged tasks."""

from __future__ import annotations

import pytest
from scoring import correct

from posttrain.lab.worlds.rewriting import rewriting, three_tasks
from posttrain.trajectory import PosttrainError


def test_strings_are_rewritten():
    for item in rewriting(operation="reverse", train=40, heldout=0).train:
        assert list(str(item.prompt)) == list(reversed(item.answer))
        assert 4 <= item.meta["length"] == len(item.answer) <= 5
    task = rewriting(operation="sort", alphabet="0123456789", train=40, heldout=0)
    for item in task.train:
        assert list(item.answer) == sorted(str(item.prompt))
        assert not correct(task, item, item.answer.lstrip("0") + ("x" if item.answer[0] != "0" else ""))


def test_three_tasks_tell_which_they_are():
    task = three_tasks(train=60, heldout=30)
    for item in task.train:
        tag, _, text = str(item.prompt).partition(": ")
        assert item.meta["domain"] == tag
        expected = {"rev": lambda t: t[::-1], "srt": lambda t: "".join(sorted(t)), "add": lambda t: str(eval(t))}[tag]
        assert item.answer == expected(text.lstrip("0") if tag == "add" else text)
    assert {i.meta["domain"] for i in task.train} == {"rev", "srt", "add"}


def test_one_of_the_three_alone_is_the_same_task():
    alone = three_tasks(only="srt", train=20, heldout=100)
    assert {i.meta["domain"] for i in (*alone.train, *alone.corpus(30))} == {"srt"}
    together = {i.prompt for i in three_tasks(train=0, heldout=300).heldout if i.meta["domain"] == "srt"}
    assert together == {i.prompt for i in alone.heldout}
    with pytest.raises(PosttrainError, match="rev, srt, add"):
        three_tasks(only="mul")


@pytest.mark.parametrize("options", [{"operation": "shuffle"}, {"length": (3, 2)}, {"alphabet": ""}])
def test_what_cannot_be_made(options):
    with pytest.raises(PosttrainError, match="rewriting"):
        rewriting(**options)
