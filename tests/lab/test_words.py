"""Word problems: graphs, wordings, and the process score by hand (card 144's unit checks)."""

from __future__ import annotations

import re

import pytest
from scoring import problem, score

from posttrain.lab.worlds.words import CONTEXTS, check, words
from posttrain.trajectory import PosttrainError, Prompt

GRAPH = {"b": {"parents": ["a"], "value": 7}, "c": {"parents": ["a", "b"], "value": 4}}
GOLD = "a+4=b:7;b-a=c:4;4"


def judged(completion, process=0.8):
    task = words(process=process, train=0, heldout=0)
    return score(task, problem(task, "a:3;b:a+4;c:b-a;c?", "4", graph=GRAPH), completion)


def test_the_gold_solution_is_verified():
    found = judged(GOLD)
    assert found.parts == {"answer": 1.0, "process": 1.0, "steps": 1.0, "verified": 1.0}
    assert found.total == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("completion", "process", "steps"),
    [
        ("a+4=b:8;b-a=c:4;4", 0.5, 0.5),  # a value: penalty 1 of 2
        ("c+4=b:7;b-a=c:4;4", 0.5, 0.5),  # a dependency
        ("a+4=b:7;4", 0.5, 0.5),  # a line left out
        ("a+4=b:7;b-a=c:4;a+a=d:6;4", 0.5, 1.0),  # a line too many
        ("a+4=b:7;b-a=c:4;b-a=c:4;4", 0.5, 1.0),  # said twice
        ("a+4=b:7;nonsense;b-a=c:4;4", 0.5, 1.0),  # what cannot be read
        ("c+4=b:8;b-a=c:4;4", 0.0, 0.5),  # value and dependency of one line
        ("4", 0.0, 0.0),
    ],
)
def test_one_mistake_costs_one_part_in_n(completion, process, steps):
    found = judged(completion)
    assert found.parts["answer"] == 1.0
    assert found.parts["process"] == pytest.approx(process)
    assert found.parts["steps"] == pytest.approx(steps)
    assert found.total == pytest.approx(0.2 + 0.8 * process)
    assert found.parts["verified"] == float(steps == 1.0)


def test_a_wrong_answer_earns_nothing():
    found = judged("a+4=b:7;b-a=c:4;5")
    assert found.total == 0.0
    assert found.parts["steps"] == 1.0
    assert found.parts["verified"] == 0.0


def test_extra_lines_cost_at_most_all():
    prompt = Prompt(None, answer="4", meta={"graph": GRAPH})  # type: ignore[arg-type]
    found = check("x;y;z;a+4=b:7;b-a=c:4;4", prompt)
    assert (found.extra, found.process) == (3, 0.0)


def test_the_outcome_alone():
    assert judged("a+4=b:8;4", process=0.0).total == 1.0


def evaluated(prompt: str, wording: str, modulus: int) -> int:
    """The asked quantity, worked out from the prompt alone by substitution."""
    context = CONTEXTS[wording]
    name = max((n for n in context.names if prompt.endswith(context.question.format(name=n))), key=len)
    body = prompt.removesuffix(context.question.format(name=name))
    pattern = re.escape(context.definition).replace(r"\{name\}", r"(?P<name>\w+)")
    pattern = pattern.replace(r"\{value\}", r"(?P<value>[\w+*-]+)")
    definitions = {m["name"]: m["value"] for m in re.finditer(pattern, body)}
    assert "".join(context.definition.format(name=n, value=v) for n, v in definitions.items()) == body

    def value(term: str) -> int:
        if term.isdigit():
            return int(term)
        parts = re.split(r"([+*-])", definitions[term])
        if len(parts) == 1:
            return value(parts[0])
        return eval(f"{value(parts[0])}{parts[1]}{value(parts[2])}") % modulus

    return value(name)


@pytest.mark.parametrize("context", CONTEXTS)
def test_prompts_say_what_the_graph_says(context):
    task = words(
        depth=(1, 5), contexts=[context], distractors=(0, 2), modulus=23, operations="+-*", shuffled=True,
        train=60, heldout=0,
    )  # fmt: skip
    for item in task.train:
        assert str(evaluated(str(item.prompt), context, 23)) == item.answer
        assert len(item.meta["graph"]) == item.meta["depth"]
        assert score(task, item, str(item.solution)).parts["verified"] == 1.0


def test_every_computed_quantity_is_needed():
    for item in words(depth=(3, 5), distractors=(1, 2), train=40, heldout=0).train:
        graph = item.meta["graph"]
        asked = str(item.prompt).removesuffix("?").rpartition(";")[2]
        reached, waiting = set(), [asked]
        while waiting:
            name = waiting.pop()
            if name in graph and name not in reached:
                reached.add(name)
                waiting += graph[name]["parents"]
        assert reached == set(graph)
        assert str(item.prompt).count(";") == 1 + item.meta["depth"] + item.meta["distractors"]


def test_domains_are_depths_or_contexts():
    assert {i.meta["domain"] for i in words(train=60, heldout=0).train} == {"op2", "op3", "op4"}
    both = words(contexts=["zoo", "films"], by="context", train=40, heldout=0)
    assert {i.meta["domain"] for i in both.train} == {"zoo", "films"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"contexts": ["sea"]}, "expected some of plain, zoo"),
        ({"depth": (9, 20)}, "takes 22 names"),
        ({"depth": (0, 2)}, "depth from 1"),
        ({"operations": "%"}, "symbols out of"),
        ({"process": 1.5}, "a share from 0 to 1"),
    ],
)
def test_what_cannot_be_made(options, message):
    with pytest.raises(PosttrainError, match=message):
        words(**options)
