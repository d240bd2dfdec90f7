"""Overlap of test items with training text, against covers counted by hand."""

from __future__ import annotations

import pytest

from posttrain.data import overlap
from posttrain.trajectory import PosttrainError

ITEM = "a b c d e f g h i j"  # ten tokens, three 8-grams


def test_the_cover_is_the_share_of_tokens_inside_matched_ngrams():
    report = overlap(["x a b c d e f g h y", "b c d e f g h i j z"], [ITEM])
    assert report.score == [0.9]  # the second text matches two 8-grams: b..j
    assert report.nearest == [1]
    assert report.exact == [False]
    assert report.contaminated == [0]


def test_covers_of_several_texts_are_not_added():
    report = overlap(["a b c d", "g h i j"], [ITEM], n=4)
    assert report.score == [0.4]
    assert report.contaminated == []


def test_exactly_half_is_not_contaminated():
    assert overlap(["a b c d e"], [ITEM], n=5).contaminated == []
    assert overlap(["a b c d e f"], [ITEM], n=5).contaminated == [0]


def test_case_and_punctuation_do_not_hide_a_copy_but_operators_tell_items_apart():
    report = overlap(['"What is (3 + 4)?"'], ["what is 3 + 4", "what is 3 * 4", "What-is: 3 + 4!"])
    assert report.exact == [True, False, True]
    assert report.score == [0.0, 0.0, 0.0]  # shorter than an 8-gram: only copies count
    assert report.contaminated == [0, 2]
    assert report.summary() == "2 of 3 test items (66.7 %) stand in the training text, 2 of them as exact copies"


def test_planted_items_are_found_and_a_clean_control_is_clean():
    tests = [" ".join(f"w{i}t{j}" for j in range(20)) for i in range(10)]
    half = " ".join(tests[3].split()[:12])
    train = [f"filler {tests[1]} end", half + " and other words", " ".join(reversed(tests[5].split())), "nothing"]
    assert overlap(train, tests).contaminated == [1, 3]
    assert overlap(train, tests).score[3] == pytest.approx(12 / 20)
    clean = overlap(["nothing to see here at all in this text"], tests)
    assert clean.contaminated == []
    assert clean.summary() == "0 of 10 test items (0.0 %) stand in the training text"


def test_repeated_ngrams_within_an_item_are_all_covered():
    assert overlap(["a b"], ["a b c a b"], n=2).score == [0.8]


def test_an_overlap_needs_items_and_an_ngram():
    with pytest.raises(PosttrainError, match="0 test items and n=8; expected at least one item and n >= 1"):
        overlap(["a"], [])
    with pytest.raises(PosttrainError, match="1 test items and n=0"):
        overlap(["a"], ["b"], n=0)
