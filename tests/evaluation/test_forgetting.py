"""AvgAcc and forgetting by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from posttrain.evaluation.forgetting import Continual
from posttrain.trajectory import PosttrainError

NAN = math.nan
AFTER = [[0.8, NAN, NAN], [0.6, 0.7, NAN], [0.5, 0.75, 0.9]]


def test_by_hand() -> None:
    found = Continual.of(["a", "b", "c"], AFTER, before=[0.4, 0.3, 0.2])
    assert found.average == pytest.approx((0.5 + 0.75 + 0.9) / 3)
    assert found.forgetting == pytest.approx(((0.5 - 0.8) + (0.75 - 0.7)) / 2)
    assert found.learned == pytest.approx((0.8 + 0.7 + 0.9) / 3)
    assert found.curve("a") == [0.4, 0.8, 0.6, 0.5]
    assert Continual.of(["a", "b", "c"], AFTER).curve("c")[2] == 0.9


def test_nothing_forgotten_and_a_single_task() -> None:
    kept = np.tile([0.3, 0.6], (2, 1))
    assert Continual.of(["a", "b"], kept).forgetting == 0
    assert math.isnan(Continual.of(["a"], [[0.5]]).forgetting)


@pytest.mark.parametrize(
    ("tasks", "after", "before", "message"),
    [
        ([], [], None, "0 tasks"),
        (["a", "b"], [[0.1, 0.2]], None, "a row and a column a task"),
        (["a", "b"], [[0.1, NAN], [NAN, 0.3]], None, "missing"),
        (["a", "b"], [[NAN, NAN], [0.2, 0.3]], None, "missing"),
        (["a"], [[0.1]], [0.1, 0.2], "2 accuracies before"),
    ],
)
def test_what_cannot_be(tasks: list[str], after: list[list[float]], before: list[float] | None, message: str) -> None:
    with pytest.raises(PosttrainError, match=message):
        Continual.of(tasks, after, before)


def test_an_unknown_task() -> None:
    with pytest.raises(PosttrainError, match="no task 'z'; the tasks are a, b"):
        Continual.of(["a", "b"], np.eye(2)).curve("z")
