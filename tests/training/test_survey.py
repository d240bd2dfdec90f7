"""Samplers that look at the policy, or leave figures, and references that are renewed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from posttrain import methods
from posttrain.data.sampler import Shuffled
from posttrain.models.causal import CausalPolicy
from posttrain.training.signals import Reference
from posttrain.trajectory import Group, PosttrainError, Prompt
from tiny_training import make_policy, online, prompts

SMALL = {"steps": 2, "batch": 3, "group": 4, "max_tokens": 5, "learning_rate": 1e-3}


class Curious(Shuffled):
    """Tries two prompts before every step."""

    def __init__(self) -> None:
        super().__init__(range(8))
        self.found: list[Group] = []

    def survey(self, prompts: Sequence[Prompt], draw: Callable[[Sequence[Prompt], int], list[Group]]) -> None:
        self.found += draw(prompts[:2], 3)

    def metrics(self) -> dict[str, float]:
        return {"curious": float(len(self.found))}


def test_a_sampler_may_try_the_prompts() -> None:
    plain, curious = Shuffled(range(8)), Curious()
    method = methods.grpo().with_settings(**SMALL)
    first, second = (online(method, sampler=sampler).source for sampler in (plain, curious))
    a, b = first.collect(0), second.collect(0)
    assert [len(group) for group in curious.found] == [3, 3]
    assert all(t.reward == t.reward for group in curious.found for t in group.trajectories), "what it draws is scored"
    assert (a.rollouts, b.rollouts) == (12, 18)
    assert b.metrics["curious"] == 2
    for own, other in zip(a.groups, b.groups, strict=True):
        assert [t.text for t in own.trajectories] == [t.text for t in other.trajectories], "the step stays what it is"
    assert curious.found[0].prompt is not None
    assert curious.found[0].prompt.key == prompts(8)[0].key
    second.collect(1)
    texts = [[t.tokens.tolist() for t in group.trajectories] for group in curious.found]
    assert texts[:2] != texts[2:], "every step's tries are its own"


def of(reference: Reference) -> dict[str, torch.Tensor]:
    assert reference.copy is not None
    return {name: p.detach().clone() for name, p in reference.copy.model.named_parameters()}


def equal(a: dict[str, torch.Tensor], policy: CausalPolicy) -> bool:
    return all(torch.equal(a[name], p) for name, p in policy.model.named_parameters())


def test_a_reference_is_renewed_when_it_is_its_turn() -> None:
    start, later = make_policy(0), make_policy(1)
    reference = Reference(start, every=3)
    for step in (1, 2):
        reference.follow(later, step)
        assert equal(of(reference), start)
    reference.follow(later, 3)
    assert equal(of(reference), later)
    assert reference.tensors().keys() == {f"reference/{name}" for name in of(reference)}
    other = Reference(start, every=3)
    other.load_tensors(reference.tensors())
    assert equal(of(other), later)
    assert Reference(start).tensors() == {}


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 2, "decay": 0.5}])
def test_what_cannot_be(options: dict[str, float]) -> None:
    with pytest.raises(PosttrainError, match="reference_every"):
        Reference(make_policy(), **options)  # type: ignore[arg-type]
