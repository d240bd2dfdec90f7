from __future__ import annotations

import pytest

from posttrain.reward.shapings.format_gate import FormatGate
from posttrain.trajectory import PosttrainError
from scored_groups import context, rewards_of, scored


def test_without_the_form_there_is_no_reward() -> None:
    group = scored("abcd", [3.0, 2.0, -1.0, 1.0], format=[1, 0, 0, 0.5])
    FormatGate()([group], context())
    assert rewards_of(group) == [3.0, 0.0, 0.0, 1.0]
    assert [t.rewards["format"] for t in group.trajectories] == [1, 0, 0, 0.5]


def test_the_component_must_be_there() -> None:
    with pytest.raises(PosttrainError, match="no component 'form'; it has format"):
        FormatGate("form")([scored("a", [1.0], format=[1])], context())
