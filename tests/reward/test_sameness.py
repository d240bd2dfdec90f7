from __future__ import annotations

import pytest

from posttrain.reward.sameness import JUDGES, LearnedSame, SameAnswer, SameText, SharedWords, judge_from
from posttrain.trajectory import PosttrainError


def test_same_answer_ignores_how_it_was_reached() -> None:
    pairs = [("2+2 is 4. Answer: 4", "#### 4.0"), ("Answer: 4", "Answer: 5"), ("4", "4")]
    assert SameAnswer()(pairs) == [True, False, True]


def test_same_text_ignores_case_punctuation_and_space() -> None:
    assert SameText()([("One, two!", "one two"), ("one two", "two one"), ("3+4", "4+3")]) == [True, False, False]


def test_shared_words_compares_with_the_longer_text() -> None:
    # 2 shared of 4; 1 shared of 3
    assert SharedWords()([("a b", "a b c d"), ("a", "a b c")]) == [True, False]
    assert SharedWords(0.3)([("a", "a b c")]) == [True]


def test_a_learned_judge_finds_what_labels_say() -> None:
    texts = [f"{a}+{b}" for a in range(1, 9) for b in range(1, 9)]
    pairs = [(x, y) for x in texts for y in texts[:20]]
    same = [sorted(x.split("+")) == sorted(y.split("+")) for x, y in pairs]  # the order of summands does not count
    judge = LearnedSame.fit(pairs[::2], same[::2])
    found = judge(pairs[1::2])
    wrong = sum(a != b for a, b in zip(found, same[1::2], strict=True))
    assert wrong <= 0.02 * len(found)
    assert sum(found) > 0
    assert judge([]) == []


def test_a_learned_judge_needs_labels_of_both_kinds() -> None:
    with pytest.raises(PosttrainError, match="of both kinds; got 1 pairs and 1 labels"):
        LearnedSame.fit([("a", "b")], [True])


def test_judges_by_name() -> None:
    assert judge_from("answer") is JUDGES["answer"]
    own = SharedWords(0.9)
    assert judge_from(own) is own
    with pytest.raises(PosttrainError, match="did you mean answer"):
        judge_from("answers")
