from __future__ import annotations

import pytest

from posttrain.reward.shapings.correctness import Correctness
from posttrain.trajectory import PosttrainError
from scored_groups import context, rewards_of, scored

RIGHT, BOXED = [1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 1.0, 0.0]


def test_the_rigid_reward_has_the_four_values_of_the_card() -> None:
    group = scored(["a", "b", "c", "d"], [9.0] * 4, right=RIGHT, boxed=BOXED)
    Correctness("right", "boxed")([group], step := context())
    assert rewards_of(group) == [1.0, 0.5, -0.5, -1.0]
    assert step.metrics == {"correct": 0.5, "well_formed": 0.5}


def test_correctness_alone_ignores_the_form() -> None:
    group = scored(["a", "b", "c", "d"], [1.2, 1.0, 0.2, 0.0], right=RIGHT, boxed=BOXED)
    Correctness("right")([group], step := context())
    assert rewards_of(group) == RIGHT
    assert step.metrics == {"correct": 0.5}


def test_the_total_decides_where_no_component_is_named() -> None:
    group = scored(["a", "b"], [1.0, 0.99])
    Correctness()([group], context())
    assert rewards_of(group) == [1.0, 0.0]


def test_an_unknown_component_is_named() -> None:
    with pytest.raises(PosttrainError, match="no component 'form'; it has right, boxed"):
        Correctness("right", "form")([scored(["a"], [1.0], right=[1.0], boxed=[0.0])], context())
