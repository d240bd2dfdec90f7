"""Budgets: what is read, what is refused, and what they do to a method."""

from __future__ import annotations

import pytest

from posttrain import methods
from posttrain.studies.budget import Budget
from posttrain.trajectory import PosttrainError


@pytest.mark.parametrize(
    ("text", "amount", "unit", "back"),
    [
        ("20m", 1200, "seconds", "20m"),
        ("90s", 90, "seconds", "90s"),
        (90, 90, "seconds", "90s"),
        ("1.5h", 5400, "seconds", "90m"),
        ("2h", 7200, "seconds", "2h"),
        ("2Mtokens", 2_000_000, "tokens", "2000ktokens"),
        ("20M tokens", 20_000_000, "tokens", "20Mtokens"),
        ("1.5ktokens", 1500, "tokens", "1500tokens"),
        ("5000rollouts", 5000, "rollouts", "5000rollouts"),
        ("64k ROLLOUTS", 64_000, "rollouts", "64krollouts"),
    ],
)
def test_reading_and_writing(text: str | int, amount: float, unit: str, back: str) -> None:
    budget = Budget.parse(text)
    assert (budget.amount, budget.unit, str(budget)) == (amount, unit, back)
    assert Budget.parse(str(budget)) == budget


@pytest.mark.parametrize(
    "text", ["5x", "", "m", "tokens", "5 minutes", "-5m", "1e3tokens", "0m", "0rollouts", "0.1tokens"]
)
def test_what_is_no_budget(text: str) -> None:
    with pytest.raises(PosttrainError, match=rf"^budget is {text!r}; expected .*a time such as 90s") as raised:
        Budget.parse(text)
    assert "\n" not in str(raised.value)


def test_within_a_budget_a_method_has_no_other_limit() -> None:
    method = methods.grpo().with_settings(steps=7, budget=3.0, token_limit=5)
    tokens = Budget.parse("2ktokens").limit(method, 12).settings
    assert (tokens.steps, tokens.epochs, tokens.budget, tokens.token_limit, tokens.rollout_limit) == (
        12, None, None, 2000, None,
    )  # fmt: skip
    own = Budget.parse("1m").limit(method.with_settings(epochs=2.0), None).settings
    assert (own.steps, own.epochs, own.budget, own.token_limit) == (7, 2.0, 60, None)
    part = Budget.parse("100rollouts").part(3).limit(method, None).settings
    assert part.rollout_limit == 33
