"""What the arms of the second looks at habits are made of."""

from __future__ import annotations

import random
import re

import pytest
import torch

from conftest import make_model
from posttrain.evaluation.task import TaskItem
from posttrain.lab.tokenizer import character_tokenizer
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.strategies.feedback import Attempt
from posttrain.studies.second_look_habits import (
    Corrections,
    corrected_carries,
    curr_reft_signal,
    other_end,
    said,
    settled,
    thoughtful_sums,
)
from posttrain.trajectory import Prompt
from tiny_tasks import step_context

SUM = Prompt(torch.tensor([1]), answer="103", key=3, meta={"steps": ["6+7=13", "4+5+1=10"], "format": "open"})


def corrected(text: str, right: float = 1.0) -> str:
    policy = CausalPolicy(make_model(), character_tokenizer())
    attempt = Attempt(SUM, text, settled(text, SUM) == 1, torch.tensor([1]))
    (tokens,) = Corrections(right)([attempt], step_context(policy))
    assert not len(tokens) or int(tokens[-1]) == policy.tokenizer.eos_token_id
    return str(policy.tokenizer.decode(tokens.tolist(), skip_special_tokens=True))


@pytest.mark.parametrize(
    ("attempt", "correction"),
    [
        ("6+7=13 4+5=9 93", "?4+5+1=10 103"),  # the first wrong column
        ("6+7=13 4+5+1=10 104", "?103"),  # the answer alone
        ("6+7=12 4+5+1=10 102", "?6+7=13 4+5+1=10 103"),  # what follows a mistake is written again
        ("6+7=12 4+5=9 92?6+7=13 93", "?4+5+1=10 103"),  # what was taken back before does not count
        ("6+7=13", "?4+5+1=10 103"),
        ("x", "?6+7=13 4+5+1=10 103"),
        ("6+7=13 4+5+1=10 103", ""),  # nothing to say
    ],
)
def test_corrections_look_at_the_attempt(attempt: str, correction: str) -> None:
    assert corrected(attempt) == correction
    assert not correction or settled(attempt + correction, SUM) == 1


def test_a_misleading_teacher_ends_wrong() -> None:
    text = "6+7=13 4+5=9 93"
    assert settled(text + corrected(text, right=0.0), SUM) == 0


def test_the_trace_is_in_sums_without_a_carry_and_ends_right() -> None:
    task = corrected_carries()
    traced = [item for item in task.train if "?" in str(item.solution)]
    plain = [item for item in task.train if item.meta["domain"] == "plain"]
    assert {item.meta["domain"] for item in traced} == {"plain"}
    assert len(traced) / len(plain) == pytest.approx(0.05, abs=0.025)
    for item in traced:
        prompt, text = Prompt(torch.tensor([1]), answer=item.answer, meta=item.meta), str(item.solution)
        assert settled(text, prompt) == 1
        assert settled(text.partition("?")[0], prompt) == 0


def test_thoughts_are_as_long_as_the_format_needs() -> None:
    task = thoughtful_sums()
    assert {item.meta["format"] for item in task.train} == {"judge", "choice", "open"}
    assert {item.meta["format"] for item in task.heldout} == {"open"}
    thinking = [item for item in task.train if str(item.solution).startswith(":")]
    for item in thinking:
        columns = item.meta["steps"] if item.meta["format"] == "open" else item.meta["steps"][:1]
        assert item.solution == f":{' '.join(columns)} {item.answer}"
        assert len(str(item.solution)) < task.sampling.max_tokens
        assert said(str(item.solution), Prompt(torch.tensor([1]), answer=item.answer)) == 1
    assert len(thinking) / len(task.train) == pytest.approx(0.25, abs=0.03)
    shown = {re.split("[ =]", item.question)[0] for item in task.train}
    assert not shown & {item.question for item in task.heldout}


def test_what_is_wrong_has_another_last_digit() -> None:
    chance = random.Random(0)
    found = {other_end(TaskItem("97+12", "109"), chance) for _ in range(200)}
    assert found == {f"10{digit}" for digit in range(9)}


def test_what_is_said_stands_behind_the_thoughts() -> None:
    assert said(":6+7=13 4+5+1=10 103", SUM) == said("103", SUM) == 1
    assert said(":6+7=13 103 4", SUM) == said("10 103", SUM) == said("1103", SUM) == 0


def test_as_many_completions_in_each_arm() -> None:
    for arm in curr_reft_signal().arms.values():
        used = [stage.settings for stage in arm.arguments["method"].stages]
        assert sum(each.steps * each.batch * each.group for each in used) == 100 * 32 * 4
        assert {each.learning_rate for each in used} == {3e-4}
