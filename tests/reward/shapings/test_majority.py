"""The majority answer as label: who votes, who wins, who is rewarded, and that no label gets through."""

from __future__ import annotations

import pytest

from posttrain.reward.shapings.majority import Equivalent, MajorityVote, majority
from scored_groups import context, rewards_of, scored


def boxed(*answers: str | None) -> list[str]:
    return ["so it goes" if a is None else rf"hence \boxed{{{a}}}" for a in answers]


def shaped(*answers: str | None, labels: list[float] | None = None, **arguments: object) -> tuple[list[float], dict]:
    group = scored(boxed(*answers), labels or [0.0] * len(answers), exact=[0.0] * len(answers))
    found = context()
    MajorityVote(**arguments)([group], found)  # type: ignore[arg-type]
    return rewards_of(group), found.metrics


@pytest.mark.limit("mm-upt")
@pytest.mark.parametrize("guard", [True, False])
def test_the_majority_is_rewarded(guard: bool) -> None:
    # card 019 (a)
    rewards, metrics = shaped("3", "3", "5", "3", None, labels=[1, 1, 0, 1, 0], guard=guard)
    assert rewards == [1, 1, 0, 1, 0]
    assert metrics == {"majority_rate": 0.6, "vote_accuracy": 1.0, "label_reward": 0.6}


@pytest.mark.limit("mm-upt")
def test_of_equals_the_first_seen_wins() -> None:
    # card 019 (d)
    assert shaped("2", "7")[0] == [1, 0]
    assert shaped("7", "2", "2", "7", "1")[0] == [1, 0, 0, 1, 0]
    assert majority(["b", None, "a"]) == "b"


def test_what_is_missing_votes_only_without_the_guard() -> None:
    assert shaped(None, None, "4")[0] == [0, 0, 1]
    assert shaped(None, None, "4", guard=False)[0] == [1, 1, 0]
    assert shaped(None, None)[0] == [0, 0]
    assert shaped(None, None)[1]["majority_rate"] == 0
    assert shaped(None, None, guard=False)[1]["majority_rate"] == 1


def test_answers_vote_as_texts_and_are_graded_as_mathematics() -> None:
    rewards, metrics = shaped("0.5", "1/2", "3", "3", "0.5", "0.5")
    assert rewards == [1, 1, 0, 0, 1, 1]
    assert metrics["majority_rate"] == 0.5  # the votes for 0.5 as it is written
    assert shaped("1/2", "0.5", "3", "3")[0] == [0, 0, 1, 1]  # split, it loses


def test_groups_vote_by_themselves() -> None:
    groups = [scored(boxed("1", "1", "2"), [0.0] * 3), scored(boxed("2", "2", "1"), [0.0] * 3)]
    MajorityVote()(groups, context())
    assert [rewards_of(g) for g in groups] == [[1, 1, 0], [1, 1, 0]]


def test_no_label_gets_through() -> None:
    group = scored(boxed("1", "1", "2"), [0.0, 0.0, 1.0], exact=[0.0, 0.0, 1.0])
    found = context()
    MajorityVote()([group], found)
    assert rewards_of(group) == [1, 1, 0]
    assert [t.rewards for t in group.trajectories] == [{"majority": 1.0}, {"majority": 1.0}, {"majority": 0.0}]
    assert found.metrics["vote_accuracy"] == 0  # the vote is wrong, and is what is learned
    assert found.metrics["label_reward"] == pytest.approx(1 / 3)


def test_a_whole_text_can_be_the_answer() -> None:
    group = scored([" 12", "12", "7"], [0.0] * 3)
    MajorityVote("text")([group], context())
    assert rewards_of(group) == [1, 1, 0]
    MajorityVote()([group], context())
    assert rewards_of(group) == [0, 0, 0]


@pytest.mark.parametrize(
    ("answer", "other", "same"),
    [("0.5", "1/2", True), ("x+1", "1+x", True), ("2", "3", False), ("Rome", "Rome", True), ("Paris", "Rome", False),
     ("Paris", "1/2", False), ("1/2", "Paris", False), ("{", "3", False)],
)  # fmt: skip
def test_equivalence(answer: str, other: str, same: bool) -> None:
    assert Equivalent()(answer, other) is same
