"""Prompts that evolve: how many, of which parents, what is known of them, and that it survives a restart."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.rollout.context import StepContext
from posttrain.rollout.evolvers import RuleEvolver, Variation
from posttrain.rollout.strategies.evolve import Evolving
from posttrain.trajectory import Completion, PosttrainError, Prompt, Sampling
from tiny_tasks import END, step_context, tiny_policy, tiny_prompts

POLICY = tiny_policy()


def grown(prompt: Prompt, chance: np.random.Generator) -> Variation:
    return Variation(prompt.question.strip() + str(chance.integers(1000)))


def by_first(completion: str, prompt: Prompt) -> float:
    """Completions differ on prompts that begin with p0 or p1 alone."""
    return (sum(completion.encode()) % 7) * float(prompt.question[:2] in ("p0", "p1"))


class Hashed:
    """An engine whose completions are a letter that follows from seed, prompt and number alone."""

    def generate(
        self, prompts: Sequence[Prompt], samples: int, sampling: Sampling, seed: int, progress: Any = None
    ) -> list[list[Completion]]:
        return [[self._one(f"{seed}/{p.question}/{s}") for s in range(samples)] for p in prompts]

    @staticmethod
    def _one(name: str) -> Completion:
        letter = hashlib.blake2b(name.encode(), digest_size=1).digest()[0] % 26 + 97
        return Completion(torch.tensor([letter, END]), torch.zeros(2), torch.zeros(2), "stop", chr(letter))


def context(step: int) -> StepContext:
    return step_context(POLICY, by_first, step=step, total=10, seed=step, engine=Hashed())


def evolving(**options: Any) -> Evolving:
    return Evolving(RuleEvolver(grown), **options)


def questions(groups: Sequence[Any]) -> list[str]:
    return [g.prompt.question.strip() for g in groups]


def test_the_share_rises_in_a_line_between_warm_up_and_autonomy() -> None:
    made = evolving(share=0.8, mixing=0.2, autonomous=0.6)
    assert [round(made.share_at(step, 10), 3) for step in range(10)] == [0, 0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8, 0.8]
    assert evolving(mixing=0.0, autonomous=0.0).share_at(0, 10) == 0.8


def test_parents_are_those_with_information() -> None:
    made = evolving(share=0.75, mixing=0, autonomous=0, offspring=2)
    first = made(tiny_prompts(4), context(0))
    assert questions(first) == ["p0:", "p1:", "p2:", "p3:"], "nothing was visited before: nothing to evolve"
    second = context(1)
    groups = made(tiny_prompts(4), second)
    names = questions(groups)
    assert names[0] == "p0:"
    assert len(names) == 4
    assert {name[:3] for name in names[1:]} == {"p0:", "p1:"}, "of p2 and p3 all completions are worth the same"
    assert second.metrics["evolved"] == 0.75
    assert second.metrics["generation"] == pytest.approx(3 / 7)
    assert {made.buffer.held[g.prompt.question].generation for g in groups[1:] if g.prompt} == {1}
    assert all(len(g) == 4 and all(np.isfinite(t.reward) for t in g.trajectories) for g in groups)


def test_information_is_that_of_the_last_visit() -> None:
    made = evolving(share=0.0)
    groups = made(tiny_prompts(2), context(0))
    for group in groups:
        assert group.prompt is not None
        rewards = [t.reward for t in group.trajectories]
        assert made.buffer.held[group.prompt.question].info == max(rewards) - min(rewards)
    before = [held.info for held in made.buffer.held.values()]
    made(tiny_prompts(2), context(3))
    assert [held.info for held in made.buffer.held.values()] != before


def test_what_is_known_already_and_what_failed_is_not_asked_again() -> None:
    def same(prompt: Prompt, chance: np.random.Generator) -> Variation | None:
        return Variation("p1:") if prompt.question.startswith("p0") else Variation("twin")

    made = Evolving(RuleEvolver(same), share=1.0, mixing=0, autonomous=0)
    made(tiny_prompts(4), context(0))
    found = questions(made(tiny_prompts(4), context(1)))
    assert found.count("twin") <= 1
    assert len(found) == len(set(found)) == 4


def test_uniform_and_inverse_are_controls() -> None:
    uniform = evolving(informativeness="uniform", share=0.0)
    uniform(tiny_prompts(4), context(0))
    assert {held.info for held in uniform.buffer.held.values()} == {1.0}
    inverse = evolving(informativeness="inverse", share=0.0)
    inverse(tiny_prompts(4), context(0))
    infos = [held.info for held in inverse.buffer.held.values()]
    assert min(infos[2:]) > max(infos[:2])


def test_a_restored_creator_goes_on_where_it_was() -> None:
    whole, other = (evolving(share=0.5, mixing=0, autonomous=0) for _ in range(2))
    for step in range(3):
        whole(tiny_prompts(4), context(step))
    other.load_state_dict(json.loads(json.dumps(whole.state_dict())))
    assert questions(other(tiny_prompts(4), context(3))) == questions(whole(tiny_prompts(4), context(3)))
    assert other.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [({"informativeness": "size"}, "one of gap"), ({"share": 1.2}, "share=1.2"), ({"mixing": 0.7}, "mixing <= auton")],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(PosttrainError, match=message):
        evolving(**options)
