"""Puzzles: answers found again by other means than the world's own."""

from __future__ import annotations

import re
from itertools import permutations, product

import pytest
from scoring import correct

from posttrain.lab.worlds.logic import logic
from posttrain.trajectory import PosttrainError


def of_kind(kind, **options):
    return logic(kinds=[kind], train=60, heldout=10, **options)


def test_boolean_values():
    for item in of_kind("boolean").train:
        values = ""
        for expression in str(item.prompt).split(","):
            python = expression.replace("T", "True").replace("F", "False").replace("!", "not ")
            values += "FT"[bool(eval(python))]
        assert item.answer == (values,)


def test_orders():
    for item in of_kind("order", size=4).train:
        facts = re.findall(r"(\w)([<>])(\w)", str(item.prompt))
        letters = sorted({x for a, _, b in facts for x in (a, b)})
        fitting = [
            "".join(p)
            for p in permutations(letters)
            if all((p.index(a) < p.index(b)) == (sign == ">") for a, sign, b in facts)
        ]
        assert tuple(fitting) == item.answer


@pytest.mark.parametrize("size", [2, 3])
def test_sums_have_exactly_the_answers_that_meet_the_conditions(size):
    task = of_kind("sums", size=size)
    for item in task.train[:4]:
        total, *conditions = str(item.prompt).split(",")
        for digits in product(range(10), repeat=size):
            names = dict(zip("xyz", digits, strict=False))
            fits = eval(total.replace("=", "=="), names) and all(eval(c, names) for c in conditions)
            assert correct(task, item, "".join(map(str, digits))) == fits


def test_colours_differ_between_neighbours():
    task = of_kind("colours", size=6)
    for item in task.train[:6]:
        edges = [("abcdef".index(a), "abcdef".index(b)) for a, b in str(item.prompt).split(",")]
        for colours in product("rgb", repeat=6):
            assert correct(task, item, "".join(colours)) == all(colours[a] != colours[b] for a, b in edges)
        reached = {0}
        for _ in range(6):
            reached |= {x for edge in edges if reached & set(edge) for x in edge}
        assert reached == set(range(6))


def test_many_answers_are_counted_and_demonstrated_alike():
    task = logic(train=200, heldout=10)
    assert {i.meta["domain"] for i in task.train} == {"sums", "colours"}
    assert all(i.meta["answers"] == len(i.answer) for i in task.train)
    assert sum(i.meta["answers"] > 1 for i in task.train) > 140
    first = sum(i.solution == i.answer[0] for i in task.train if len(i.answer) >= 8)
    assert first < 40  # any answer is as likely as another


@pytest.mark.parametrize("options", [{"kinds": ["chess"]}, {"kinds": []}, {"size": 9}, {"kinds": ["sums"], "size": 4}])
def test_what_cannot_be_made(options):
    with pytest.raises(PosttrainError, match="logic"):
        logic(**options)
