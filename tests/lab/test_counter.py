from __future__ import annotations

import itertools

import pytest

from posttrain.lab.worlds.counter import counter, shown
from posttrain.trajectory import PosttrainError


def test_by_hand() -> None:
    assert shown(3, ["+4", "*2"]) == "4"
    assert shown(3, ["*2", "+4"]) == "0"
    assert shown(7, []) == "7"


def test_problems_say_what_they_need() -> None:
    task = counter(steps=(2, 3), train=300, heldout=60)
    assert (len(task.train), len(task.heldout)) == (300, 60)
    domains = set()
    for item in [*task.train, *task.heldout]:
        start, *events = str(item.prompt).split(";")
        assert events == item.meta["events"]
        assert item.answer == item.solution == shown(int(start), events)
        results = {shown(int(start), list(order)) for order in itertools.permutations(events)}
        assert (len(results) > 1) == (item.meta["domain"] == "order")
        domains.add(item.meta["domain"])
    assert domains == {"order", "any"}
    assert {item.meta["domain"] for item in counter(order=1.0, train=50, heldout=0).train} == {"order"}


def test_arguments_are_checked() -> None:
    with pytest.raises(PosttrainError, match="expected 2 to 6 steps"):
        counter(steps=(1, 2))
