"""Groups of scored completions given by texts and rewards, and a step's context without a training loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from posttrain.models.causal import CausalPolicy
from posttrain.rollout.context import StepContext
from posttrain.trajectory import Group, Prompt, Sampling, Trajectory


def scored(texts: Sequence[str], rewards: Sequence[float], **components: Sequence[float]) -> Group:
    """One group. components: parts of the reward by name, a value a completion."""
    prompt = Prompt(torch.tensor([1, 3]), text="question")
    members = []
    for i, (text, reward) in enumerate(zip(texts, rewards, strict=True)):
        tokens = torch.tensor([1, 3, *(4 + ord(c) % 90 for c in text), 2])
        parts = {name: values[i] for name, values in components.items()}
        mask = torch.arange(len(tokens)) >= 2
        members.append(Trajectory(tokens, mask, reward=reward, rewards=parts, finish="stop", text=text))
    return Group(members, prompt)


def rewards_of(group: Group) -> list[float]:
    return [t.reward for t in group.trajectories]


def facts_of(group: Group, name: str) -> list[float]:
    return [t.facts[name] for t in group.trajectories]


def context(reference: CausalPolicy | None = None, **fields: Any) -> StepContext:
    """A step's context that can draw nothing."""

    @contextmanager
    def opened() -> Iterator[CausalPolicy]:
        assert reference is not None
        yield reference

    given: dict[str, Any] = {"step": 0, "total": 1, "engine": None, "sampling": Sampling(), "group": 4, "seed": 0}
    given |= {"score": lambda groups: None, "reference": None if reference is None else opened}
    return StepContext(**{**given, **fields})
