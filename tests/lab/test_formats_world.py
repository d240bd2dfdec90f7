"""Instructions with constraints, scored by hand."""

from __future__ import annotations

import pytest
from scoring import correct, problem, score

from posttrain.lab.worlds.formats import CONSTRAINTS, formats, formatted, met
from posttrain.trajectory import PosttrainError


@pytest.mark.parametrize(
    ("constraints", "text"),
    [
        ([], "bacd"),
        (["up"], "BACD"),
        (["dash"], "b-a-c-d"),
        (["dot"], "bacd."),
        (["quote"], '"bacd"'),
        (["up", "dash", "dot", "quote"], '"B-A-C-D."'),
    ],
)
def test_constraints_by_hand(constraints, text):
    assert formatted("bacd", constraints) == text
    assert met(text) == set(constraints)


@pytest.mark.parametrize(
    ("completion", "answer", "form"),
    [
        ("B-A-C.", 1.0, 1.0),
        ("B-A-C", 1.0, 0.75),
        ("bac", 1.0, 0.25),
        ('"b-a-c"', 1.0, 0.25),
        ("A-B-C.", 0.0, 1.0),
        ("B-AC.", 1.0, 0.0),  # a dash that is no dash between all letters
        ("B-A-C!", 1.0, 0.0),
        ("Bac", 1.0, 0.0),
    ],
)
def test_scores_by_hand(completion, answer, form):
    task = formats(train=0, heldout=0)
    item = problem(task, "rev cab;up;dash;dot", "B-A-C.", constraints=["up", "dash", "dot"], letters="bac")
    found = score(task, item, completion)
    assert (found.parts["answer"], found.parts["format"]) == (answer, form)
    assert found.total == pytest.approx(0.5 * answer + 0.5 * form)
    assert correct(task, item, completion) == (answer == form == 1.0)


def test_instructions_are_followed():
    task = formats(constraints=(0, 4), train=300, heldout=0)
    for item in task.train:
        head, *wanted = str(item.prompt).split(";")
        kind, word, *size = head.split()
        letters = {"copy": word, "rev": word[::-1], "sort": "".join(sorted(word))}.get(kind) or word * int(size[0])
        assert item.meta["letters"] == letters
        assert wanted == item.meta["constraints"] == [c for c in CONSTRAINTS if c in wanted]
    assert {i.meta["domain"] for i in task.train} == {"copy", "rep", "rev", "sort"}
    assert {len(i.meta["constraints"]) for i in task.train} == {0, 1, 2, 3, 4}


@pytest.mark.parametrize("options", [{"contents": ["sing"]}, {"constraints": (2, 5)}, {"length": (0, 3)}])
def test_what_cannot_be_made(options):
    with pytest.raises(PosttrainError, match="formats"):
        formats(**options)
