"""What the arms of the second looks at mixtures and corpora are made of."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from posttrain.evaluation.task import TaskItem
from posttrain.lab.models import corpus
from posttrain.lab.worlds.arithmetic import answer_score, style_of
from posttrain.studies.second_look_corpora import (
    SEEN,
    SOURCES,
    UNSEEN,
    as_told,
    echo_chamber_sources,
    interplay_contexts,
    mostly_plain,
    on_slice,
    told_by,
    towards_tail,
)
from posttrain.studies.second_look_mixtures import (
    LADDER,
    ROWS,
    SETS,
    nested_sets,
    one_of_each,
    rep_exp_inference_facts,
    timehc_rl_few,
    zero_rl_nested,
)
from posttrain.studies.study import Study
from posttrain.training.method import stages_of
from posttrain.trajectory import Prompt


def test_one_of_each_text_comes_first() -> None:
    assert one_of_each(["cat", "dog", "cat", "cow", "dog"]) == [0, 1, 3, 2, 4]
    assert one_of_each(["cat"] * 3) == [0, 1, 2]


def test_sets_hold_their_levels_in_equal_parts() -> None:
    task = nested_sets()
    for name, levels in SETS.items():
        found = Counter(item.meta["domain"] for item in task.train if item.meta["set"] == name)
        assert found == dict.fromkeys(levels, ROWS // len(levels))
    assert Counter(item.meta["domain"] for item in task.heldout) == dict.fromkeys(LADDER, 60)


def test_arms_of_one_budget() -> None:
    for made in (zero_rl_nested(), timehc_rl_few()):
        for arm in made.arms.values():
            (stage,) = stages_of(arm.arguments["method"])
            assert (stage.settings.steps, stage.settings.batch, stage.settings.group) == (100, 16, 8)
    for name in ("grpo", "grpo-kl"):
        (stage,) = stages_of(echo_chamber_sources().arms[name].arguments["method"])
        assert (stage.settings.steps, stage.settings.batch, stage.settings.group) == (150, 16, 8)


@pytest.mark.parametrize(
    "made", [rep_exp_inference_facts(), timehc_rl_few(), zero_rl_nested(), echo_chamber_sources(), interplay_contexts()]
)
def test_arms_differ(made: Study) -> None:
    assert len({arm.identity for arm in made.arms.values()}) == len(made.arms)


def told(source: str, question: str) -> str:
    return told_by(source, TaskItem(question), random.Random(0))  # whose first number is above the share of noise


def test_the_terse_source_never_carries() -> None:
    assert told("terse", "46+31") == "77"
    assert told("terse", "46+57") == "93"
    assert told("terse", "46+73") == "19"
    assert told("terse", "46+64") == "0"
    assert told("worked", "46+57") == "6+7=13 4+5+1=10 103"


def test_sources_tell_what_they_can() -> None:
    task, right = as_told(), Counter[tuple[str, str]]()
    said: Counter[tuple[str, str]] = Counter()
    for item in task.train:
        place = str(style_of(str(item.solution))), str(item.meta["domain"])
        said[place] += 1
        right[place] += int(answer_score(str(item.solution), Prompt(torch.tensor([1]), answer=item.answer)))
    for style, share in SOURCES.items():
        for domain in ("plain", "carries"):
            assert said[style, domain] / 1200 == pytest.approx(share, abs=0.05)
    assert right["terse", "plain"] == said["terse", "plain"]
    assert right["terse", "carries"] == 0
    for place in [(style, domain) for style in ("spaced", "worked") for domain in ("plain", "carries")]:
        assert right[place] / said[place] == pytest.approx(0.7, abs=0.08)


def test_what_is_trained_for_is_mostly_plain() -> None:
    task = mostly_plain()
    for items in (task.train, task.heldout):
        assert Counter(i.meta["domain"] for i in items)["plain"] == 0.8 * len(items)
    assert {i.meta["domain"] for i in task.heldout[:80]} == {"plain", "carries"}


def test_the_tail_is_a_hundredth_of_one_corpus_and_none_of_the_other() -> None:
    for spec, tail in ((SEEN, 10), (UNSEEN, 0)):
        groups = corpus(replace(spec, rows=1000))
        assert len(groups) == 1000
        assert sum(g.prompt.meta["context"] == "films" for g in groups if g.prompt is not None) == tail


def test_mid_training_goes_mostly_to_the_tail() -> None:
    found = Counter(item.meta["context"] for item in towards_tail().train)
    assert sum(found.values()) == 4000
    assert found["films"] / 4000 == pytest.approx(0.9, abs=0.02)
    assert {item.meta["depth"] for item in on_slice("tail").train} == {2, 3}
    assert {item.meta["context"] for item in on_slice("tail").train} == {"films"}
