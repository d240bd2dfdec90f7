from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.reward.extract import as_number, extract_answer, find_answer, last_number


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("so <answer> 7 </answer> and <answer>\n8\n</answer>, Answer: 9", "8"),
        (r"first \boxed{1}, then \boxed{\frac{1}{2}} Answer: 3", r"\frac{1}{2}"),
        (r"\boxed{4} and an open \boxed{5", "4"),
        ("Answer: 1\nno:\nAnswer: 14\nI hope this helps.", "14"),
        ("**Answer:** 14", "14"),
        ("The final answer: **blue whale**", "blue whale"),
        ("Answer:\n1 2\n3 4\n", "1 2\n3 4"),
        ("2 + 3 = 5\n#### 5", "5"),
        ("The answer is 21.", "21."),
        ("Answer: 5\nThough one may say the answer is 6", "5"),
        ("answers: 3", None),
        (" just text ", None),
    ],
)
def test_find_answer(text: str, answer: str | None) -> None:
    assert find_answer(text) == answer
    assert extract_answer(text) == (text.strip() if answer is None else answer)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it costs $1,234.50.", "1234.50"),
        ("12+7=19.", "19"),
        ("5-3", "3"),
        ("x = -.5", "-.5"),
        ("so...14", "14"),
        ("−3 degrees", "-3"),
        ("$-5", "-5"),
        ("a1", None),
        ("none here", None),
    ],
)
def test_last_number(text: str, number: str | None) -> None:
    assert last_number(text) == number


@given(st.integers(-(10**12), 10**12), st.sampled_from(["", "the total is ", "= ", "("]))
@settings(deadline=None)
def test_every_integer_is_found_with_and_without_commas(value: int, before: str) -> None:
    for spelled in (str(value), f"{value:,}"):
        found = last_number(f"7 {before}{spelled} apples")
        assert found is not None
        assert int(found) == value
        assert as_number(spelled) == value


def test_as_number_takes_only_a_lone_number() -> None:
    assert as_number(" +1,000.0 ") == Decimal(1000)
    assert as_number("3e2") == 300
    for text in ("3 apples", "1,00", "", "3-4", "nan"):
        assert as_number(text) is None
