"""What a label among the rollouts earns."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from posttrain.objective.advantage import GroupNormalised
from posttrain.objective.batch import Batch
from posttrain.reward.shapings.label import LabelControl
from posttrain.reward.shapings.solved import Solved
from posttrain.rollout.context import StepContext
from posttrain.trajectory import Group, PosttrainError, Sampling, Source, Trajectory


def one(source: Source, reward: float, **parts: float) -> Trajectory:
    tokens = torch.tensor([1, 2])
    return Trajectory(tokens, torch.tensor([False, True]), reward=reward, rewards=parts, source=source)


def context(**weights: float) -> StepContext:
    nothing = cast(Any, None)
    return StepContext(0, 1, nothing, Sampling(), 2, nothing, 0, weights=weights)


def group(rollouts: list[float], label: float) -> Group:
    return Group([*(one("policy", r) for r in rollouts), one("expert", label)])


def test_a_label_that_no_rollout_matches_keeps_its_reward() -> None:
    # card 007, check (a)
    found, here = group([0, 0, 0], 1), context()
    LabelControl()([found], here)
    assert found.trajectories[-1].reward == 1
    assert here.metrics == {"label_matched": 0, "label_gap": 1}


@pytest.mark.limit("visurf")
@pytest.mark.parametrize("rollouts", [[1, 0, 1], [1, 0.1, 0.7, 0.3], [1 / 3, 0.9, 1.0, 1.0, 0.123]])
def test_a_matched_label_has_no_advantage_at_all(rollouts: list[float]) -> None:
    # card 007, check (b)
    found, here = group(rollouts, 1), context()
    LabelControl()([found], here)
    assert found.trajectories[-1].reward == pytest.approx(sum(rollouts) / len(rollouts), abs=1e-7)
    assert float(GroupNormalised(eps=1e-6).of(Batch.of([found]))[-1]) == 0.0
    assert here.metrics["label_matched"] == 1
    assert here.metrics["label_gap"] == 0


def test_without_smoothing_a_matched_label_stays_above_the_mean() -> None:
    found = group([1, 0, 1], 1)
    LabelControl(smooth=False)([found], context())
    assert found.trajectories[-1].reward == 1


def test_a_label_gets_no_credit_for_thinking() -> None:
    label = one("expert", 1.5, answer=1.0, think=1.0)
    rollout = one("policy", 0.5, answer=0.0, think=1.0)
    LabelControl(("think",))([Group([rollout, label])], context(answer=1.0, think=0.5))
    assert label.reward == 1.0
    assert rollout.reward == 0.5


def test_thinking_alone_does_not_match_a_label() -> None:
    # a wrong answer with thinking earns as much as the label, but not in the components that a label can have
    label = one("expert", 1.0, answer=1.0, think=0.0)
    wrong = one("policy", 1.0, answer=0.0, think=1.0)
    LabelControl(("think",))([Group([wrong, label])], context(answer=1.0, think=1.0))
    assert label.reward == 1.0
    right = one("policy", 2.0, answer=1.0, think=1.0)
    LabelControl(("think",))([Group([wrong, right, label])], context(answer=1.0, think=1.0))
    assert label.reward == 1.5  # the mean of what the rollouts really earn


def test_a_component_that_is_not_there_is_named() -> None:
    with pytest.raises(PosttrainError, match="no component 'think'; expected one of answer"):
        LabelControl(("think",))([group([0], 1)], context(answer=1.0))


def test_solved_counts_the_rollouts_of_a_group() -> None:
    groups = [group([1, 0, 1], 1), group([0, 0.5], 1)]
    Solved()(groups, context())
    assert [[t.facts["solved"] for t in g.trajectories] for g in groups] == [[2] * 4, [0] * 3]
    assert [t.reward for t in groups[1].trajectories] == [0, 0.5, 1]
    Solved(0.5)(groups, context())
    assert [g.trajectories[0].facts["solved"] for g in groups] == [2, 1]
