from __future__ import annotations

import re

import pytest

from posttrain.lab import worlds
from posttrain.lab.worlds.sums import working
from posttrain.trajectory import PosttrainError


def test_working_by_hand() -> None:
    assert working([3, 4, 2, 1, 3], 5) == ["42", "24", "10", "33"]


@pytest.mark.parametrize("budget", [False, True])
@pytest.mark.parametrize("copied", [False, True])
def test_documents_end_in_the_sum_and_their_scratch_in_a_beginning_of_the_working(copied: bool, budget: bool) -> None:
    task = worlds.sums(copied=copied, budget=budget, train=30, heldout=10)
    for item in task.train + task.heldout:
        digits = [int(c) for c in str(item.prompt)]
        assert item.solution == item.answer == (f"{item.prompt}=" if copied else "") + str(sum(digits) % 5)
    shown = [item for item in task.corpus(300) if "[" in str(item.solution)]
    assert 170 < len(shown) < 250
    cut = set()
    for item in shown:
        whole = "".join(working([int(c) for c in str(item.prompt)], 5))
        found = re.search(r"\d\d\[(\d*)\]" if budget else r"\[(\d*)\]", str(item.solution))
        assert found
        assert whole.startswith(found[1])
        cut.add(len(whole) - len(found[1]))
        score = task.reward.components["answer"][0]
        assert score(item.solution, item) == 1.0  # a scratch neither helps nor harms the answer
        assert score(str(item.solution)[:-1] + "x", item) == 0.0
    assert cut == {0, 2, 4, 6, 8, 10}


def test_what_cannot_be() -> None:
    with pytest.raises(PosttrainError, match="modulus=12"):
        worlds.sums(modulus=12)
