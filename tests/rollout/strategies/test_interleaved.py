"""Some of a step's prompts are tried, the others demonstrated."""

from __future__ import annotations

import pytest
from scripted import context, prompt

from posttrain.rollout.strategies.demonstrations import Interleaved, scored_demonstrations
from posttrain.trajectory import PosttrainError


@pytest.mark.parametrize(("share", "prompts", "group", "demonstrated"), [
    (0.2, 24, 8, 16),  # 64 rollouts and 16 demonstrations
    (0.2, 40, 8, 27), (0.5, 9, 8, 8), (0.5, 4, 1, 2), (0.01, 8, 8, 1), (0.99, 2, 8, 1), (0.0, 8, 8, 0),
])  # fmt: skip
def test_the_share_is_of_the_steps_sequences(share: float, prompts: int, group: int, demonstrated: int) -> None:
    assert Interleaved(share).demonstrated(prompts, group) == demonstrated


def test_the_last_prompts_are_demonstrated_and_the_others_tried() -> None:
    prompts = [prompt(f"q{i}", "yes") for i in range(3)]
    here = context({f"q{i}": ["no", "yes"] for i in range(3)}, group=2)
    groups = Interleaved(0.25)(prompts, here)  # 4 rollouts and 1 demonstration: 1/5; 2 and 2: 1/2
    assert [[t.source for t in g.trajectories] for g in groups] == [["policy"] * 2, ["policy"] * 2, ["expert"]]
    assert [g.prompt for g in groups] == prompts
    assert [[t.reward for t in g.trajectories] for g in groups] == [[0, 1], [0, 1], [1]]
    assert here.sampled == 4


def test_without_a_share_every_prompt_is_tried() -> None:
    groups = Interleaved(0.0)([prompt("a", "yes")], context({"a": ["no"]}, group=1))
    assert [t.source for g in groups for t in g.trajectories] == ["policy"]


def test_demonstrations_are_copies_with_a_score_of_their_own() -> None:
    one = prompt("a", "oh yes")
    (found,) = scored_demonstrations([one], context({}, group=1))
    assert found.reward == 0.5
    assert found is not one.demonstration
    assert one.demonstration is not None
    assert one.demonstration.rewards == {}


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(PosttrainError, match="from 0 to below 1"):
        Interleaved(1.0)
    with pytest.raises(PosttrainError, match="needs 2 prompts"):
        Interleaved(0.2)([prompt("a", "yes")], context({}, group=2))
    with pytest.raises(PosttrainError, match="has none"):
        Interleaved(0.5)([prompt("a", None), prompt("b", None)], context({"a": ["no"], "b": ["no"]}, group=1))
