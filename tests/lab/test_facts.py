"""Facts: one world for all tasks, a power law in corpora, two hops that follow one hop."""

from __future__ import annotations

from collections import Counter

import pytest
from scoring import correct

from posttrain.lab.worlds.facts import BOSS, VALUES, facts, people
from posttrain.trajectory import PosttrainError


def test_frequencies_follow_the_power_law():
    crowd = people(50, 1.5)
    assert sum(crowd.frequency) == pytest.approx(1)
    assert crowd.frequency[0] / crowd.frequency[7] == pytest.approx(8**1.5)
    drawn = Counter(i.meta["rank"] for i in facts(count=50, exponent=1.5, train=0, heldout=0).corpus(4000))
    assert drawn[0] / 4000 == pytest.approx(crowd.frequency[0], rel=0.1)
    assert drawn[1] / drawn[0] == pytest.approx(2**-1.5, rel=0.2)


def test_the_task_asks_about_everybody_alike():
    asked = Counter(i.meta["rank"] for i in facts(count=20, train=200, heldout=0).train)
    assert max(asked.values()) < 2.5 * min(asked.values())


def test_answers_are_the_facts_of_the_world():
    crowd = people()
    task = facts(hops=0.5, train=100, heldout=20)
    for item in task.train:
        person, attribute = item.meta["person"], item.meta["attribute"]
        if item.meta["hops"] == 2:
            expected = crowd.facts[crowd.facts[person, BOSS], attribute]
            assert item.prompt == f"{attribute} of boss of {person}?"
        else:
            expected = crowd.facts[person, attribute]
        assert item.answer == expected
        assert person in str(item.prompt)
        assert not correct(task, item, next(v for v in VALUES["pet"] if v != item.answer))
    assert {i.meta["hops"] for i in task.train} == {1, 2}


def test_the_world_does_not_depend_on_the_seed_of_the_task():
    answers = {}
    for seed in range(3):
        for item in facts(train=300, heldout=100, seed=seed).train:
            key = (item.meta["person"], item.meta["attribute"])
            assert answers.setdefault(key, item.answer) == item.answer
    other = facts(train=300, heldout=0, world=1).train
    assert any(answers.get((i.meta["person"], i.meta["attribute"]), i.answer) != i.answer for i in other) or all(
        (i.meta["person"], i.meta["attribute"]) not in answers for i in other
    )


def test_nobody_is_their_own_boss():
    crowd = people(30)
    assert all(crowd.facts[name, BOSS] != name for name in crowd.names)
    assert len(set(crowd.names)) == 30


def test_domains_are_by_rank():
    for item in facts(count=40, train=200, heldout=0).train:
        rank = item.meta["rank"]
        assert item.meta["domain"] == ("head" if rank < 4 else "middle" if rank < 20 else "tail")


@pytest.mark.parametrize(("options", "message"), [({"count": 1}, "from 2"), ({"hops": 2.0}, "a share")])
def test_what_cannot_be_made(options, message):
    with pytest.raises(PosttrainError, match=message):
        facts(**options)
