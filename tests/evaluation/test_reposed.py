"""Problems in three formats: what is asked, what is right, and that nothing held out is touched."""

from __future__ import annotations

import random
from collections import Counter

import pytest
import torch

from posttrain.evaluation.reposed import reposed
from posttrain.evaluation.task import Task, TaskItem
from posttrain.reward.reward import Reward, reward_from
from posttrain.reward.verifiers import ExactMatch, Format
from posttrain.trajectory import PosttrainError, Prompt


def task(count: int = 20, reward: Reward | None = None, **fields: object) -> Task:
    train = [TaskItem(f"{i}+1", str(i + 1), {"domain": "add"}, f"{i + 1}") for i in range(count)]
    held = [TaskItem(f"{i}+2", str(i + 2)) for i in range(5)]
    return Task("sums", train, held, reward or reward_from("exact_match"), **fields)  # type: ignore[arg-type]


def by_format(made: Task) -> dict[str, list[TaskItem]]:
    found: dict[str, list[TaskItem]] = {}
    for item in made.train:
        found.setdefault(item.meta["format"], []).append(item)
    return found


def scored(made: Task, item: TaskItem, completion: str) -> float:
    prompt = Prompt(torch.zeros(0, dtype=torch.int64), text=item.question, answer=item.answer, meta=item.meta)
    score = made.reward.score(prompt, completion, tokens=1, finish="stop")
    assert not score.errors
    return score.total


def test_every_problem_three_times() -> None:
    made = reposed(task())
    found = by_format(made)
    assert {form: len(items) for form, items in found.items()} == {"judge": 20, "choice": 20, "open": 20}
    assert sorted(item.question for item in found["open"]) == sorted(item.question for item in task().train)
    assert all(item.meta["domain"] == "add" for item in made.train)
    assert [item.question for item in made.heldout] == [item.question for item in task().heldout]
    assert all(item.meta["format"] == "open" for item in made.heldout)
    assert made.metric == "exact_match"


def test_judgements_are_true_as_often_as_not() -> None:
    items = by_format(reposed(task()))["judge"]
    assert Counter(item.answer for item in items) == {"yes": 10, "no": 10}
    for item in items:
        question, _, rest = item.question.partition("\nProposed answer: ")
        proposed = int(rest.partition("\n")[0])
        truth = int(question.split("+")[0]) + 1
        assert (proposed == truth) == (item.answer == "yes")
        assert item.solution == item.answer


def test_choices_hold_the_right_answer_once_at_any_place() -> None:
    items = by_format(reposed(task(), options=3))["choice"]
    for item in items:
        question, *lines, _ = item.question.split("\n")
        offered = dict(line.split(". ") for line in lines)
        assert list(offered) == ["A", "B", "C"]
        assert len(set(offered.values())) == 3
        right = [letter for letter, value in offered.items() if int(value) == int(question.split("+")[0]) + 1]
        assert right == [item.answer]
    assert set(Counter(item.answer for item in items)) == {"A", "B", "C"}


def test_each_format_is_scored_by_its_own_rule() -> None:
    made = reposed(task())
    found = by_format(made)
    for form, wrong in (("judge", "maybe"), ("choice", "E"), ("open", "-3")):
        item = found[form][0]
        assert scored(made, item, item.answer) == 1, "the open reward alone would never score a judgement"
        assert scored(made, item, wrong) == 0
    assert scored(made, found["judge"][0], "7") == 0


def test_other_components_stay_as_they_are() -> None:
    made = reposed(task(reward=Reward({"right": (ExactMatch(), 2.0), "format": (Format("<.*>"), 1.0)}), metric="right"))
    item = by_format(made)["judge"][0]
    prompt = Prompt(torch.zeros(0, dtype=torch.int64), answer=item.answer, meta=item.meta)
    score = made.reward.score(prompt, f"<{item.answer}>", tokens=1, finish="stop")
    assert (score.parts, score.total) == ({"right": 1.0, "format": 1.0}, 3.0)
    with pytest.raises(PosttrainError, match="does not say which part"):
        reposed(task(reward=Reward({"right": (ExactMatch(), 2.0), "format": (Format("<.*>"), 1.0)})))


def test_wordings_wrong_answers_and_conversations() -> None:
    def wrong(item: TaskItem, chance: random.Random) -> str:
        return chance.choice(["x", "y"])

    words = {"judge": "{question}={proposed}?", "choice": "{question} {options}"}
    made = reposed(task(4), options=2, wrong=wrong, wordings=words, separator=" ")
    assert {item.question for item in by_format(made)["judge"]} & {"0+1=1?", "0+1=x?", "0+1=y?"}
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Capital of France?"}]
    cities = [TaskItem(chat, "Paris"), TaskItem("Capital of Italy?", ["Rome", "Roma"]), TaskItem("Of Peru?", "Lima")]
    made = reposed(Task("cities", cities, [], reward_from("exact_match")), options=2)
    judged = [item for item in by_format(made)["judge"] if not isinstance(item.prompt, str)]
    assert judged[0].prompt[0] == chat[0]
    assert "Proposed answer: " in judged[0].question
    italy = next(item for item in by_format(made)["choice"] if item.question.startswith("Capital of Italy"))
    assert "Rome" in italy.question, "of several reference answers the first is offered"


def test_the_same_seed_makes_the_same_task() -> None:
    assert reposed(task(), seed=3).train == reposed(task(), seed=3).train
    assert reposed(task(), seed=3).train != reposed(task(), seed=4).train


@pytest.mark.parametrize(
    ("given", "options", "message"),
    [
        (Task("t", [TaskItem("a", None)], [], reward_from("exact_match")), {}, "has no answer to judge"),
        (Task("t", [TaskItem("a", "b")], [], reward_from("exact_match")), {}, "fewer than . wrong answers"),
        (task(), {"options": 6}, "2 to 5 letters"),
        (task(), {"wordings": {"quiz": "?"}}, "expected judge, choice, open"),
    ],
)
def test_what_cannot_be(given: Task, options: dict, message: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(PosttrainError, match=message):
        reposed(given, **options)
