"""What the arms of the shaping and exploration studies are made of."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from conftest import make_model, make_tokenizer
from posttrain.models.causal import CausalPolicy
from posttrain.studies.exploration import orders
from posttrain.studies.reward_shaping import another_order, doubted, doubtful, late, long_winded, shown, upside_down
from posttrain.training.stage import Trained
from posttrain.trajectory import Prompt
from scored_groups import scored


def test_the_inaccurate_reward_model_misses_most_of_what_is_right() -> None:
    right, wrong = [], []
    for key in range(400):
        prompt = Prompt(torch.tensor([1]), answer="13", key=key)
        right.append(doubtful("13", prompt))
        wrong.append(doubtful("14", prompt))
    assert sum(score == 0.8 for score in right) / 400 == pytest.approx(0.3, abs=0.08)
    assert all(score == 0.8 or 0.2 <= score <= 0.4 for score in right)
    assert all(0.2 <= score <= 0.4 for score in wrong)
    assert right[0] == doubtful("13", Prompt(torch.tensor([1]), answer="13", key=0))


def test_the_doubted_task_is_measured_by_the_exact_verifier() -> None:
    task = doubted()
    prompt = Prompt(torch.tensor([1]), answer="13", key=1)
    score = task.reward.score(prompt, "13", tokens=3, finish="stop")
    assert score.total == doubtful("13", prompt)
    assert task.correct(score)


def test_what_shows_working() -> None:
    prompt = Prompt(torch.tensor([1]), text="6+7")
    assert shown("6+7=13 13", prompt) == shown("1+1=3 7", prompt) == 1.0  # right or wrong
    assert shown("13", prompt) == 0.0
    assert shown("= + 13", prompt) == 0.0  # no form of the world: no answer can be extracted


def test_another_order_of_a_string() -> None:
    prompt, chance = Prompt(torch.tensor([1])), np.random.default_rng(0)
    assert another_order("rev: ab\n", prompt, chance) == "rev: ba\n"
    assert another_order("srt: 777\n", prompt, chance) is None
    assert another_order("add: 46+57\n", prompt, chance) is None


def test_hackable_and_wrong_thinking_rewards() -> None:
    prompt = Prompt(torch.tensor([1]), answer="13", meta={"steps": ["6+7=13"]})
    assert upside_down("6+7=13 13", prompt) == 0.0
    assert upside_down("6+7=12 12", prompt) == 1.0
    assert long_winded("x" * 20, prompt) == 0.5
    assert long_winded("x" * 90, prompt) == 1.0


def test_late_metrics() -> None:
    result = Trained(CausalPolicy(make_model(), make_tokenizer()), metrics=[{"a": float(i)} for i in range(8)] + [{}])
    assert late(result, "a") == 7.0  # of the last two steps, the one that has it
    assert math.isnan(late(result, "b"))


def test_orders_of_a_pool() -> None:
    policy = CausalPolicy(make_model(), make_tokenizer())
    pool = scored(["aa", "aa", "ab", "zz"], [0.0] * 4)
    assert orders("bigrams", policy, [pool], 0)[0] in ([0, 3, 2, 1], [0, 2, 3, 1])
    for order in ("states", "random vectors", "chance"):
        assert sorted(orders(order, policy, [pool], 0)[0]) == [0, 1, 2, 3]
    assert orders("bigrams", policy, [pool], 0)[0][-1] == 1  # the duplicate
