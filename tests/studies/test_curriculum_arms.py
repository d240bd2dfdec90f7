"""What the arms of the curriculum and mixture studies are made of."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch

from posttrain.data.mixture_weights import Record
from posttrain.evaluation.task import Task, TaskItem
from posttrain.studies.curriculum import curr_reft, in_three_formats
from posttrain.studies.mixtures import DOMAINS, best_predicted, best_seen, elsewhere, four_domains
from posttrain.trajectory import Prompt


def correct(task: Task, item: TaskItem, completion: str) -> bool:
    prompt = Prompt(torch.tensor([1]), answer=item.answer, meta=item.meta)
    return task.correct(task.reward.score(prompt, completion, tokens=1, finish="stop"))


def test_three_formats_to_train_on_and_open_questions_held_out() -> None:
    task = in_three_formats()
    assert Counter(item.meta["format"] for item in task.train) == {"judge": 1500, "choice": 1500, "open": 1500}
    assert {item.meta["format"] for item in task.heldout} == {"open"}
    shown = {re.match(r"\w in \w+", item.question)[0] for item in task.train}  # type: ignore[index]
    assert not shown & {item.question for item in task.heldout}
    for form, right, wrong in (("judge", ("yes", "no"), "3"), ("choice", ("A", "B", "C"), "3"), ("open", "345", "yes")):
        item = next(item for item in task.train if item.meta["format"] == form and item.answer in right)
        assert correct(task, item, item.answer)
        assert not correct(task, item, wrong if wrong != item.answer else "no")


def test_stages_keep_their_steps_and_their_share_of_the_rate() -> None:
    stages = curr_reft().arms["curr-reft"].arguments["method"].stages
    assert [stage.settings.steps for stage in stages] == [30, 30, 30, 10]
    assert [stage.settings.learning_rate for stage in stages] == pytest.approx([3e-4, 3e-4, 3e-4, 6e-5])
    for arm in curr_reft().arms.values():  # as many completions in each
        used = [stage.settings for stage in arm.arguments["method"].stages]
        assert sum(each.steps * each.batch * each.group for each in used) == 100 * 32 * 4


def test_no_prompt_is_in_two_domains_or_in_the_test() -> None:
    task, other = four_domains(DOMAINS), elsewhere(0)
    assert {item.meta["domain"] for item in task.train} == set(DOMAINS)
    prompts = [item.question for item in (*task.train, *other.heldout)]
    assert len(set(prompts)) == len(prompts)
    assert len(other.heldout) == 192


def test_the_best_seen_and_the_best_predicted_mixture() -> None:
    domains = ["a", "b"]
    records = [Record({"a": 1.0}, 0.2), Record({"b": 1.0}, 0.3), Record({"a": 3.0, "b": 1.0}, 0.6)]
    assert best_seen(records, domains).tolist() == [0.75, 0.25]
    peak = best_predicted(records, domains, degree=2)  # of 0.3 + 1.9 a - 2 a^2, which goes through the three
    assert peak.tolist() == pytest.approx([0.475, 0.525], abs=0.01)
    assert best_predicted(records, domains, degree=1)[0] > 0.9  # the line through them rises
