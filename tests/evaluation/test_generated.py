from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from posttrain.evaluation.generated import reasoning_gym
from posttrain.reward.verifiers import ReasoningGym
from posttrain.trajectory import PosttrainError


def questions(items: list[Any]) -> list[str]:
    return [item.prompt for item in items]


def test_no_question_occurs_twice_and_none_is_shared() -> None:
    task = reasoning_gym("chain_sum", train=120, heldout=50, terms=[2, 2], digits=[1, 1])  # of 200 problems
    train, heldout = questions(task.train), questions(task.heldout)
    assert (len(train), len(heldout)) == (120, 50)
    assert len({*train, *heldout}) == 170


def test_the_held_out_problems_do_not_depend_on_the_amount_of_training_data() -> None:
    small = reasoning_gym("chain_sum", train=5, heldout=20, seed=4)
    large = reasoning_gym("chain_sum", train=700, heldout=20, seed=4)
    assert questions(small.heldout) == questions(large.heldout)
    assert questions(small.train) == questions(large.train)[:5]


def test_neighbouring_seeds_give_other_problems() -> None:
    zero = questions(reasoning_gym("chain_sum", train=0, heldout=100, seed=0).heldout)
    one = questions(reasoning_gym("chain_sum", train=0, heldout=100, seed=1).heldout)
    assert len({*zero} & {*one}) < 10


@pytest.mark.parametrize("asked", [201, 2000])
def test_a_generator_without_enough_problems_says_how_many_there_are(asked: int) -> None:
    with pytest.raises(PosttrainError, match=f"only 200 distinct problems with these settings; {asked} were asked for"):
        reasoning_gym("chain_sum", train=asked - 50, heldout=50, terms=[2, 2], digits=[1, 1])


def test_pairs_stand_for_lowest_and_highest() -> None:
    task = reasoning_gym("chain_sum", train=0, heldout=60, terms=(2, 3), min_digits=2, max_digits=2)
    lengths = {item.meta["entry"]["metadata"]["num_terms"] for item in task.heldout}
    assert lengths == {2, 3}
    assert {item.meta["entry"]["metadata"]["num_digits"] for item in task.heldout} == {2}
    assert "min_terms=2, max_terms=3" in task.description


def test_instruction_solution_and_scoring(tiny_tokenizer: Any) -> None:
    task = reasoning_gym("chain_sum", train=3, heldout=3, instruction="End with Answer:", solution="steps", name="sums")
    assert task.name == "sums"
    for item in task.train:
        assert item.prompt.endswith("=\nEnd with Answer:")  # type: ignore[union-attr]
    for prompt, item in zip(task.prompts(tiny_tokenizer, "train"), task.train, strict=True):
        right = task.reward.score(prompt, str(item.solution), tokens=3, finish="stop")
        wrong = task.reward.score(prompt, f"Answer: {int(item.answer) + 1}", tokens=3, finish="stop")
        assert task.correct(right)
        assert not task.correct(wrong)
        assert not right.errors
        assert not wrong.errors


def test_a_bare_scorer_in_a_mixed_reward_takes_the_settings_of_the_task() -> None:
    reward = {"reasoning_gym": 1.0, "length": {"maximum": 9, "weight": 0.1}, "on_error": -1}
    task = reasoning_gym("chain_sum", train=1, heldout=1, reward=reward, terms=[2, 2])
    assert task.reward.components["reasoning_gym"][0] == ReasoningGym("chain_sum", {"min_terms": 2, "max_terms": 2})
    assert task.reward.weights == {"reasoning_gym": 1.0, "length": 0.1}
    assert task.reward.on_error == -1
    assert task.metric == "reasoning_gym"
    assert reasoning_gym("chain_sum", train=1, heldout=1, reward="exact_match").metric is None


@pytest.mark.parametrize("name", ["pool_matrix", "list_functions"])  # these draw from the global random state
def test_tasks_are_the_same_every_time_and_leave_the_global_state_alone(name: str) -> None:
    random.seed(5)
    np.random.seed(5)  # noqa: NPY002
    python, numpy = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index]  # noqa: NPY002
    first = reasoning_gym(name, train=4, heldout=4)
    assert random.getstate() == python
    assert np.random.get_state()[1].tolist() == numpy  # type: ignore[index]  # noqa: NPY002
    random.seed(6)
    np.random.seed(6)  # noqa: NPY002
    second = reasoning_gym(name, train=4, heldout=4)
    assert [(i.prompt, i.answer) for i in first.train] == [(i.prompt, i.answer) for i in second.train]


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("chain_sun", {}, "unknown reasoning-gym task 'chain_sun'; did you mean chain_sum"),
        (
            "chain_sum",
            {"min_term": 2},
            r"unknown setting of chain_sum 'min_term'; did you mean min_terms .*allow_",
        ),
        ("chain_sum", {"size": 5}, "unknown setting of chain_sum 'size'"),
        ("chain_sum", {"terms": 3}, r"terms is 3; expected a pair \[lowest, highest\]"),
        ("chain_sum", {"terms": [2, 3], "min_terms": 2}, "min_terms given twice"),
        ("chain_sum", {"min_terms": 2, "terms": [2, 3]}, "min_terms given twice"),
        ("chain_sum", {"terms": [4, 3]}, "refuses min_terms=4, max_terms=3: max_terms must be >= min_terms"),
        ("chain_sum", {"min_terms": "two"}, "refuses min_terms='two'"),
        ("chain_sum", {"train": -1}, "expected numbers from 0"),
        ("chain_sum", {"solution": "stepz"}, "did you mean steps"),
    ],
)
def test_what_is_wrong_is_named(name: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(PosttrainError, match=message) as caught:
        reasoning_gym(name, **config)
    assert "\n" not in str(caught.value)
