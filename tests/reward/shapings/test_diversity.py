from __future__ import annotations

import pytest

from posttrain.reward.sameness import Pair
from posttrain.reward.shapings.diversity import Classes, Diversity, RareNgrams, connected, shares_elsewhere
from posttrain.trajectory import PosttrainError
from scored_groups import context, facts_of, rewards_of, scored


def test_share_of_the_others_in_another_class() -> None:
    assert shares_elsewhere([0, 0, 1, 2]) == [2 / 3, 2 / 3, 1, 1]  # the completion itself does not count as different
    assert shares_elsewhere([0, 0, 0]) == [0, 0, 0]
    assert shares_elsewhere([0, 1, 2]) == [1, 1, 1]
    assert shares_elsewhere([0]) == [1]


def test_classes_are_what_the_judge_connects() -> None:
    assert connected(3, [(0, 1), (1, 2)]) == [0, 0, 0]
    assert connected(3, [(1, 2)]) == [0, 1, 1]
    assert connected(6, [(4, 5), (2, 3), (3, 5)]) == [0, 1, 2, 2, 2, 2]
    chain = Classes(lambda pairs: [abs(int(a) - int(b)) == 1 for a, b in pairs])
    assert chain.of([["1", "2", "3", "9"]]) == [[0, 0, 0, 3]]


def test_the_judge_is_asked_once_about_every_pair() -> None:
    calls: list[list[Pair]] = []

    def judge(pairs: list[Pair]) -> list[bool]:
        calls.append(list(pairs))
        return [a == b for a, b in pairs]

    assert Classes(judge)([["a", "b", "a"], ["c"], ["d", "d"]]) == [[0.5, 1, 0.5], [1], [0, 0]]
    assert calls == [[("a", "b"), ("a", "a"), ("b", "a"), ("d", "d")]]


def test_quality_times_diversity() -> None:
    group = scored(["a", "a", "b", "c"], [1.0, 0.0, 1.0, 0.5])
    Diversity()([group], step := context())
    assert rewards_of(group) == pytest.approx([2 / 3, 0, 1, 0.5])
    assert facts_of(group, "diversity") == pytest.approx([2 / 3, 2 / 3, 1, 1])
    assert step.metrics["diversity"] == pytest.approx(10 / 12)


def test_duplicates_get_the_floor_and_not_nothing() -> None:
    group = scored(["a"] * 4, [1.0, 1.0, 0.0, 1.0])
    Diversity(floor=0.2)([group], context())
    assert rewards_of(group) == pytest.approx([0.2, 0.2, 0, 0.2])
    assert facts_of(group, "diversity") == [0, 0, 0, 0]


def test_where_all_differ_rewards_stay_as_they_are() -> None:
    group = scored(["a", "b", "c"], [1.0, 0.25, -2.0])
    Diversity()([group], context())
    assert rewards_of(group) == [1.0, 0.25, -2.0]


def test_additive_diversity_pays_for_wrong_and_different() -> None:
    group = scored(["a", "a", "b"], [1.0, 1.0, 0.0])
    Diversity(combine="add", weight=0.5)([group], context())
    assert rewards_of(group) == [1.25, 1.25, 0.5]


def test_among_correct_completions_alone() -> None:
    group = scored(["a", "a", "b", "c"], [1.0, 1.0, 1.0, 0.0])
    Diversity(correct_only=True)([group], context())
    assert rewards_of(group) == pytest.approx([0.5, 0.5, 1.0, 0.0])
    alone = scored(["a", "b", "c"], [1.0, 0.0, 0.2])
    Diversity(correct_only=True)([alone], context())
    assert rewards_of(alone) == pytest.approx([1.0, 0.0, 0.02])  # the only right one keeps its reward


def test_shifted_rewards_do_not_pay_for_duplicates() -> None:
    group = scored(["a", "a", "b"], [-1.0, -3.0, -2.0])
    Diversity(shift=True)([group], context())
    assert rewards_of(group) == pytest.approx([1.0, 0.0, 1.0])


def test_rare_ngrams() -> None:
    measure = RareNgrams(2)
    # "a b", "b c" against "a b", "b d": one of two is its own; a short text is a gram of its own
    assert measure([["a b c", "a b d", "x"], ["p q", "p q"]]) == [[0.5, 0.5, 1.0], [0.0, 0.0]]
    assert RareNgrams(3, "characters")([["abcd", "abcx"]]) == [[0.5, 0.5]]


def test_combine_is_checked() -> None:
    with pytest.raises(PosttrainError, match="expected multiply or add"):
        Diversity(combine="plus")  # type: ignore[arg-type]
