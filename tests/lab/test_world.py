"""What all worlds promise: seeds, distinct problems, the held-out border, solutions that are right and fit."""

from __future__ import annotations

import pytest
from scoring import correct

from posttrain.evaluation.task import Task
from posttrain.lab.tokenizer import character_tokenizer
from posttrain.lab.worlds import WORLDS, arithmetic, find, logic
from posttrain.lab.worlds.world import is_heldout
from posttrain.trajectory import PosttrainError

SINGLE = [name for name in WORLDS if name != "turns"]


@pytest.mark.parametrize("name", SINGLE)
def test_solutions_are_right_and_fit(name):
    task = find(name)(train=40, heldout=20)
    tokenizer = character_tokenizer()
    assert task.train
    assert task.heldout
    for item in (*task.train, *task.heldout, *task.corpus(50)):
        assert correct(task, item, str(item.solution)), item
        assert not correct(task, item, ""), item
        length = len(tokenizer.encode(str(item.solution), add_special_tokens=False)) + 1
        assert length <= task.sampling.max_tokens, item
        assert 3 not in tokenizer.encode(f"{item.prompt}{item.solution}"), item


@pytest.mark.parametrize("name", WORLDS)
def test_the_seed_decides_and_sizes_do_not(name):
    make = find(name)
    small, large, other = make(train=10, heldout=10), make(train=30, heldout=10), make(train=10, heldout=10, seed=1)
    prompts = [str(item.prompt) for item in small.heldout]
    assert prompts == [str(item.prompt) for item in large.heldout]
    assert prompts != [str(item.prompt) for item in other.heldout]
    again = make(train=10, heldout=10)
    assert [(i.prompt, i.answer, i.meta, i.solution) for i in again.train] == [
        (i.prompt, i.answer, i.meta, i.solution) for i in small.train
    ]
    assert [i.prompt for i in small.corpus(20, 3)] == [i.prompt for i in again.corpus(20, 3)]


@pytest.mark.parametrize("name", WORLDS)
def test_no_corpus_and_no_training_set_holds_a_heldout_problem_of_any_seed(name):
    make = find(name)
    heldout = {str(i.prompt) for seed in range(3) for i in make(train=0, heldout=30, seed=seed).heldout}
    trained = {str(i.prompt) for seed in range(3) for i in make(train=60, heldout=0, seed=seed).train}
    corpus = {str(i.prompt) for i in make(train=0, heldout=0).corpus(300)}
    assert len(corpus) > 20
    assert not heldout & (trained | corpus)


def test_the_border_leaves_a_fifth_out():
    task = arithmetic(train=0, heldout=0)
    assert task.draw is not None
    sides = [is_heldout(i) for i in arithmetic(train=2000, heldout=400).train]
    assert not any(sides)
    assert all(map(is_heldout, arithmetic(train=0, heldout=400).heldout))


def test_a_world_with_too_few_problems_says_so():
    with pytest.raises(PosttrainError, match=r"train=200, but only \d\d distinct train problems"):
        arithmetic(digits=((1, 1), (1, 1)), train=200)


def test_negative_sizes_are_refused():
    with pytest.raises(PosttrainError, match="train=-1"):
        arithmetic(train=-1)


def test_an_unknown_world_gets_the_nearest_name():
    with pytest.raises(PosttrainError, match="arithmetic"):
        find("arithmetik")


def test_demonstrations_of_a_corpus_are_those_of_the_task():
    task = arithmetic(train=20, heldout=0)
    tokenizer = character_tokenizer()
    expected = [g.trajectories[0] for g in task.demonstrations(tokenizer)]
    found = task.demonstrated([*reversed(task.train), *task.train], tokenizer)
    assert len(found) == 40
    for group, want in zip(found, [*reversed(expected), *expected], strict=True):
        assert group.trajectories[0].tokens.tolist() == want.tokens.tolist()
        assert group.trajectories[0].action_mask.tolist() == want.action_mask.tolist()


def test_several_solutions_of_one_problem_are_all_demonstrated():
    task = logic(kinds=["sums"], train=0, heldout=0)
    items = task.corpus(600)
    by_prompt: dict[object, set[str | None]] = {}
    for item in items:
        by_prompt.setdefault(item.prompt, set()).add(item.solution)
    assert any(len(solutions) > 1 for solutions in by_prompt.values())
    found = task.demonstrated(items, character_tokenizer())
    assert [g.trajectories[0].text for g in found] == [i.solution for i in items]


def test_a_task_without_generator_has_no_corpus():
    task = arithmetic(train=5, heldout=0)
    task.draw = None
    with pytest.raises(PosttrainError, match="no generator"):
        task.corpus(3)
    assert isinstance(task, Task)
