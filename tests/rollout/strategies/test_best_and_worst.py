"""Pairs of a group's best and worst: which they are, and what happens where nothing is better than anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest

from posttrain.objective.batch import Batch
from posttrain.objective.denominator import CurrentPolicy
from posttrain.objective.mask import DropTies
from posttrain.rollout.context import StepContext
from posttrain.rollout.strategies.pairs import BestAgainstWorst, best_against_worst
from posttrain.rollout.strategy import Plain
from posttrain.trajectory import Group, PosttrainError, Prompt
from scored_groups import context, scored


@dataclass
class Given:
    """Groups that were made before, and a state."""

    groups: list[Group]
    count: int = 0
    reference: ClassVar[bool] = True

    def __call__(self, prompts: Sequence[Prompt], context: StepContext) -> list[Group]:
        return self.groups

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"]


def test_best_against_worst() -> None:
    pair = best_against_worst(scored("abcde", [0.5, 1.0, 0.0, 1.0, 0.0]))
    assert pair is not None
    assert [(t.text, t.label, t.reward) for t in pair.trajectories] == [("b", "chosen", 1.0), ("c", "rejected", 0.0)]
    assert best_against_worst(scored("ab", [0.1 + 0.2, 0.3])) is None
    with pytest.raises(PosttrainError, match="set group to 2"):
        best_against_worst(scored("a", [1.0]))


def test_groups_without_a_winner_are_left_out() -> None:
    surroundings = context()
    groups = [scored("ab", [1.0, 1.0]), scored("cde", [0.0, 0.5, 1.0])]
    pairs = BestAgainstWorst(Given(groups))([], surroundings)
    assert [[t.text for t in pair.trajectories] for pair in pairs] == [["e", "c"]]
    assert surroundings.metrics == {"reward": pytest.approx(3.5 / 5), "undecided": 0.5}
    assert groups[1].trajectories[0].label == "none", "the group itself stays as it was"


def test_where_nothing_wins_the_step_teaches_nothing() -> None:
    (pair,) = BestAgainstWorst(Given([scored("ab", [1.0, 1.0]), scored("cd", [0.0, 0.0])]))([], context())
    batch = Batch.of([pair])
    assert batch.label.tolist() == [1, -1]
    logp = batch.target * -0.1
    assert not DropTies()(batch, CurrentPolicy()(batch, logp), logp).keep.any()
    decided = best_against_worst(scored("ab", [1.0, 0.0]))
    assert decided is not None
    both = Batch.of([pair, decided])
    logp = both.target * -0.1
    kept = DropTies()(both, CurrentPolicy()(both, logp), logp).keep
    assert kept.tolist() == [False] * 4 + [True] * 4
    alone = Batch.of([decided])
    assert DropTies()(alone, CurrentPolicy()(alone, alone.target * -0.1), alone.target * -0.1).keep.all()


def test_it_speaks_for_the_strategy_inside() -> None:
    made, other = BestAgainstWorst(Given([], count=3)), BestAgainstWorst(Given([]))
    other.load_state_dict(made.state_dict())
    assert isinstance(other.inner, Given)
    assert other.inner.count == 3
    assert made.reference
    assert not made.demonstrations
    assert BestAgainstWorst(Plain()).state_dict() == {}
