"""Arithmetic: digits, carries, operations, styles, and steps checked by hand."""

from __future__ import annotations

import pytest
from scoring import correct, problem, score

from posttrain.lab.worlds.arithmetic import arithmetic, carries_of, style_of, tiers, working
from posttrain.trajectory import PosttrainError


@pytest.mark.parametrize(
    ("a", "operation", "b", "steps"),
    [
        (46, "+", 57, ["6+7=13", "4+5+1=10"]),
        (46, "+", 7, ["6+7=13", "4+0+1=5"]),
        (52, "-", 37, ["12-7=5", "5-3-1=1"]),
        (100, "-", 1, ["10-1=9", "10-0-1=9", "1-0-1=0"]),
        (23, "*", 4, ["3*4=12", "2*4+1=9"]),
        (99, "*", 9, ["9*9=81", "9*9+8=89"]),
    ],
)
def test_working_by_hand(a, operation, b, steps):
    assert working(a, operation, b) == steps


@pytest.mark.parametrize(
    ("a", "operation", "b", "count"),
    [(46, "+", 57, 2), (12, "+", 34, 0), (95, "+", 10, 1), (999, "+", 1, 3), (52, "-", 37, 1), (100, "-", 1, 2)],
)
def test_carries_by_hand(a, operation, b, count):
    assert carries_of(a, operation, b) == count


@pytest.mark.parametrize("operations", ["+", "-", "+-", "*"])
@pytest.mark.parametrize("style", ["terse", "spaced", "worked"])
def test_problems_are_what_was_asked_for(operations, style):
    second = (1, 1) if operations == "*" else (2, 3)
    for item in arithmetic(digits=((2, 3), second), operations=operations, style=style, train=60, heldout=0).train:
        sign = next(s for s in "+-*" if s in str(item.prompt))
        a, b = map(int, str(item.prompt).split(sign))
        assert sign in operations
        result = {"+": a + b, "-": a - b, "*": a * b}[sign]
        assert item.answer == str(result)
        assert result >= 0
        assert item.meta["digits"] == max(len(str(a)), len(str(b)))
        assert style_of(str(item.solution)) == style
        if style == "worked":
            assert str(item.solution).split() == [*working(a, sign, b), str(result)]
            assert all(eval(left) == int(right) for left, right in (s.split("=") for s in item.meta["steps"]))


def test_carries_are_kept_to():
    for low, high in ((0, 0), (1, 1), (2, 2)):
        task = arithmetic(operations="+-", carries=(low, high), train=40, heldout=0)
        assert {item.meta["carries"] for item in task.train} == set(range(low, high + 1))


def test_more_than_two_operands():
    for item in arithmetic(digits=((1, 1), (1, 1), (1, 1)), operations="+-", train=50, heldout=0).train:
        assert eval(str(item.prompt)) == int(item.answer) >= 0


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("103", True),
        (" 103\n", True),
        ("ans: 1 0 3", True),
        ("6+7=13 4+5+1=10 103", True),
        ("1+1=3 103", True),  # the answer alone decides
        ("0103", False),
        ("104", False),
        ("1 0 3", False),
        ("ans: 103 ", False),
        ("6+7=13 4+5+1=10 104", False),
        ("103 103", False),
        ("", False),
    ],
)
def test_the_verifier_by_hand(completion, right):
    task = arithmetic(train=0, heldout=0)
    assert correct(task, problem(task, "46+57", "103"), completion) is right


@pytest.mark.parametrize(
    ("completion", "process"),
    [
        ("6+7=13 4+5+1=10 103", 1.0),
        ("6+7=13 4+5+1=11 113", 0.5),
        ("6+7=13 103", 0.5),
        ("6+7=13 4+5+1=10 1+1=2 103", 2 / 3),  # a step too many
        ("4+5+1=10 6+7=13 103", 0.0),  # out of order
        ("103", 0.0),
    ],
)
def test_steps_by_hand(completion, process):
    task = arithmetic(style="worked", process=0.5, train=0, heldout=0)
    item = problem(task, "46+57", "103", steps=["6+7=13", "4+5+1=10"])
    found = score(task, item, completion)
    assert found.parts["process"] == pytest.approx(process)
    assert found.total == pytest.approx(found.parts["answer"] + 0.5 * process)


def test_tiers_are_equal_parts_and_differ_as_they_say():
    task = tiers(train=90, heldout=30)
    by_tier = {name: [i for i in task.train if i.meta["domain"] == name] for name in ("easy", "medium", "hard")}
    assert [len(items) for items in by_tier.values()] == [30, 30, 30]
    assert {i.meta["carries"] for i in by_tier["easy"]} == {0}
    assert {i.meta["carries"] for i in by_tier["medium"]} == {1, 2}
    assert {i.meta["digits"] for i in by_tier["hard"]} == {3}
    assert len({i.meta["domain"] for i in task.train[:10]}) > 1  # the first few are of several tiers


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"style": "long"}, "expected one of terse, spaced, worked"),
        ({"operations": "/"}, r"out of \+-\*"),
        ({"digits": ((2, 2),)}, "each of two or more operands"),
        ({"digits": ((3, 2), (1, 1))}, "each of two or more operands"),
        ({"operations": "*", "style": "worked"}, "a second one of one digit"),
        ({"operations": "*", "carries": (0, 1)}, "sums and differences"),
        ({"operations": "*", "digits": ((1, 1),) * 3}, "products take two operands"),
        ({"carries": (3, 4)}, r"has carries in \(3, 4\)"),
    ],
)
def test_what_cannot_be_made(options, message):
    with pytest.raises(PosttrainError, match=message):
        arithmetic(**options)
