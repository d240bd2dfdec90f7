"""Sampling in rounds: who is asked again, when it stops, what is selected, and what is known about the pool."""

from __future__ import annotations

from typing import Any

import pytest

from posttrain.rollout.strategies.adaptive import UntilDecided
from posttrain.trajectory import Group, PosttrainError, Prompt
from tiny_tasks import Scripted, step_context, tiny_policy, tiny_prompts


def right(completion: str, prompt: Prompt) -> float:
    return float(completion == "+")


def played(strategy: UntilDecided, *scripts: str, group: int = 4, **fields: Any) -> tuple[list[Group], Scripted, dict]:
    """Groups of prompts whose completions are right (+) or wrong (any other character) as their scripts say."""
    engine = Scripted(dict(zip((p.key for p in tiny_prompts(len(scripts))), scripts, strict=True)))
    context = step_context(tiny_policy(), right, engine=engine, group=group, **fields)
    return strategy(tiny_prompts(len(scripts)), context), engine, context.metrics


def texts(group: Group) -> str:
    return "".join(t.text for t in group.trajectories)


def facts(group: Group) -> set[tuple[float, float]]:
    return {(t.facts["pool_mean"], t.facts["pool_size"]) for t in group.trajectories}


def test_prompts_are_asked_until_they_have_both() -> None:
    groups, engine, metrics = played(
        UntilDecided(rounds=3, samples=4), "++ab", "+abc" + "+def", "abcd" * 2 + "abc+", "++++" * 3
    )
    keys = [p.key for p in tiny_prompts(4)]
    assert engine.asked == [keys, keys[1:], keys[2:]]  # the first is decided at once, the second after two rounds
    assert [texts(g) for g in groups] == ["++ab", "++ab", "+abc", "++++"]
    assert [facts(g) for g in groups] == [{(0.5, 4)}, {(0.25, 8)}, {(1 / 12, 12)}, {(1.0, 12)}]
    assert metrics["samples_per_prompt"] == (4 + 8 + 12 + 12) / 4
    assert metrics["unresolved"] == 0.5
    assert metrics["one_sided_pools"] == 0.25
    assert metrics["reward"] == (2 + 1 + 0 + 4) / 16  # of the first round


def test_positive_stops_at_the_first_right_one() -> None:
    # card 128 (d): after the first round if and only if at least one of its completions is right
    groups, engine, _ = played(UntilDecided(2, 4, "positive"), "abc+", "abcd" + "ab+d", "++++")
    keys = [p.key for p in tiny_prompts(3)]
    assert engine.asked == [keys, keys[1:2]]
    assert [texts(g) for g in groups] == ["+abc", "+abc", "++++"]


def test_never_draws_every_round() -> None:
    _, engine, _ = played(UntilDecided(3, 2, "never"), "++++++", "+a+a+a")
    assert len(engine.asked) == 3
    assert {len(keys) for keys in engine.asked} == {2}


@pytest.mark.parametrize(
    ("size", "pool", "selected"),
    [
        (4, "abcdefgh", "abcd"),  # none is right
        (4, "++++++++", "++++"),  # all are
        (4, "abc+defg", "+abc"),  # one is
        (4, "a+++++++", "++a+"),  # one is wrong: the rest from the right ones
        (4, "abcdef++", "++ab"),  # the first ones, in order of sampling
        (5, "+++abcde", "++abc"),  # half of five is two
        (8, "+a+b+c+d", "++++abcd"),
    ],
)
def test_selection(size: int, pool: str, selected: str) -> None:
    (group,), _, _ = played(UntilDecided(1, 8, "never"), pool, group=size)
    assert texts(group) == selected


def test_a_completion_is_right_above_the_threshold() -> None:
    def partly(completion: str, prompt: Prompt) -> float:
        return {"+": 1.0, "p": 0.7, "q": 0.8}.get(completion, 0.0)

    engine = Scripted({tiny_prompts(1)[0].key: "pqa+"})
    context = step_context(tiny_policy(), partly, engine=engine)
    (group,) = UntilDecided(1, 4)(tiny_prompts(1), context)
    assert texts(group) == "q+pa"
    assert facts(group) == {(0.5, 4)}


def test_a_pool_of_one_has_no_mean() -> None:
    (group,), _, _ = played(UntilDecided(1, 1), "+", group=1)
    assert facts(group) == {(0.0, 1)}


def test_the_rounds_must_fill_a_group() -> None:
    with pytest.raises(PosttrainError, match="cannot fill a group of 4"):
        played(UntilDecided(1, 3), "abc")


def test_every_round_draws_anew() -> None:
    context = step_context(tiny_policy(), lambda text, prompt: 0.0)
    groups = UntilDecided(4, 2, "never")(tiny_prompts(2), context)
    assert context.sampled == 16
    assert all(len({t.text for t in g.trajectories}) > 2 for g in groups)
