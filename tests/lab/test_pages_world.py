"""Pages: as long as they should be, on one side of the border; and the text of the lab, made of them and others."""

from __future__ import annotations

import dataclasses

from scoring import correct

from posttrain import lab
from posttrain.lab import text
from posttrain.lab.models import ModelSpec, Share, World
from posttrain.lab.tokenizer import character_tokenizer
from posttrain.lab.worlds.pages import SUBJECTS, mixed, pages
from posttrain.lab.worlds.world import BORDER

SORT = World("rewriting", {"operation": "sort", "length": (3, 4)})
TWO = ModelSpec("two", SORT, (Share(SORT, 3.0), Share(World("facts"), 1.0)))


def first_lines(page):
    """Prompts on a page, from its lines; the last one may be cut."""
    lines = f"{page.prompt}\n{page.solution}".split("\n")
    return lines[0:-1:2]


def test_pages_are_equally_long():
    task = pages(train=20, heldout=10)
    groups = task.demonstrated([*task.train, *task.heldout, *task.corpus(20)], character_tokenizer())
    assert {t.length for group in groups for t in group.trajectories} == {128}


def test_problems_of_a_page_are_on_one_side_of_the_border():
    def side(prompt):
        return lab.worlds.world.TaskItem(prompt).key % BORDER == 0

    task = pages(train=60, heldout=30)
    for page, unseen in [*((p, False) for p in (*task.train, *task.corpus(60))), *((p, True) for p in task.heldout)]:
        whole = first_lines(page)[:-1]  # the last prompt on a page may be cut short
        assert whole
        assert all(side(prompt) == unseen for prompt in whole), page


def test_the_problems_of_pages_are_those_of_the_task():
    task = mixed(train=80, heldout=40)
    assert {item.meta["domain"] for item in task.heldout} == set(SUBJECTS)
    for item in (*task.train, *task.heldout):
        assert correct(task, item, f"{item.solution}\n")
        assert not correct(task, item, f"{item.solution}x")
    assert task.sampling.stop == ("\n",)


def test_fresh_text_follows_the_seed_and_is_not_what_was_trained_on():
    spec = lab.preset("mixed")
    one, again, other = (text.fresh(spec, 6, seed) for seed in (0, 0, 1))
    assert [g.trajectories[0].text for g in one] == [g.trajectories[0].text for g in again]
    assert [g.trajectories[0].text for g in one] != [g.trajectories[0].text for g in other]
    trained = {g.trajectories[0].text for g in lab.models.corpus(dataclasses.replace(spec, rows=50))}
    assert not trained & {g.trajectories[0].text for g in (*one, *other)}


def test_heldout_text_has_the_corpus_shares_and_nothing_that_is_trained_on():
    found = text.heldout(TWO, 40)
    assert len(found) == 40
    assert sum(g.prompt.meta["domain"] == "rewriting" for g in found) == 30
    assert all(g.prompt.key % BORDER == 0 for g in found)


def test_plain_text_alternates_between_worlds():
    found = text.plain(21, seed=3)
    assert len(found) == 21
    assert found == text.plain(21, seed=3) != text.plain(21)
    assert all("\n" in problem for problem in found)
