"""Where a step's groups come from: a data set (offline) or rollouts scored by a reward (online)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from posttrain.data.sampler import Sampler
from posttrain.reward.reward import Reward
from posttrain.rollout.engine import Engine, Progress
from posttrain.rollout.environment import Environment
from posttrain.rollout.rollout import rollout
from posttrain.training.settings import Settings
from posttrain.trajectory import Group, PosttrainError, Prompt

MAX_ROUNDS = 4  # how often prompts are drawn again in place of groups that the sampler refuses


@dataclass(slots=True)
class Collected:
    """A step's groups, and what was measured on the way."""

    groups: list[Group]
    metrics: dict[str, float] = field(default_factory=dict)


class Source(Protocol):
    sampler: Sampler

    @property
    def rows(self) -> int: ...
    def collect(self, step: int, progress: Progress | None = None) -> Collected: ...


class Offline:
    """Rows of a data set, `settings.batch` a step."""

    def __init__(self, groups: Sequence[Group], sampler: Sampler, settings: Settings) -> None:
        self.groups, self.sampler, self.settings = groups, sampler, settings

    @property
    def rows(self) -> int:
        return len(self.groups)

    def collect(self, step: int, progress: Progress | None = None) -> Collected:
        groups = [self.groups[i] for i in self.sampler.take(min(self.settings.batch, self.rows))]
        lengths = [t.actions for g in groups for t in g.trajectories]
        return Collected(groups, {"length": sum(lengths) / len(lengths)})


class Online:
    """Rollouts on `settings.batch` prompts a step, `settings.group` each, scored by the reward."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        sampler: Sampler,
        settings: Settings,
        engine: Engine,
        reward: Reward,
        seed: int,
        environment: Environment | None = None,
    ) -> None:
        self.prompts, self.sampler, self.settings = prompts, sampler, settings
        self.engine, self.reward, self.seed, self.environment = engine, reward, seed, environment

    @property
    def rows(self) -> int:
        return len(self.prompts)

    def collect(self, step: int, progress: Progress | None = None) -> Collected:
        wanted = min(self.settings.batch, self.rows)
        admitted: list[Group] = []
        seen: list[Group] = []
        begun = time.perf_counter()
        for round_ in range(MAX_ROUNDS):
            rows = self.sampler.take(wanted - len(admitted))
            seed = (self.seed * 1_000_003 + step) * MAX_ROUNDS + round_
            fresh = rollout(
                self.engine,
                [self.prompts[i] for i in rows],
                self.settings.group,
                self.settings.sampling,
                seed,
                self.environment,
                progress,
            )
            self.reward.score_groups(fresh)
            seen += fresh
            admitted += self.sampler.admit(fresh)
            if len(admitted) >= wanted:
                break
        metrics = summarise(seen)
        metrics["rollout_seconds"] = time.perf_counter() - begun
        metrics["completions_per_second"] = sum(map(len, seen)) / metrics["rollout_seconds"]
        if len(seen) != len(admitted):
            metrics["admitted"] = len(admitted) / len(seen)
        # nothing admitted after all rounds: the step goes on with what there is, and its gradient is zero
        return Collected(admitted or seen[:wanted], metrics)


def summarise(groups: Sequence[Group]) -> dict[str, float]:
    """Means over the fresh rollouts: reward and its components, length, share cut off, and the share of groups that are
    undecided, whose rewards differ."""
    members = [t for g in groups for t in g.trajectories]
    if not members:
        raise PosttrainError("a rollout returned no completion")
    count = len(members)
    metrics = {
        "reward": sum(t.reward for t in members) / count,
        "length": sum(t.actions for t in members) / count,
        "truncated": sum(t.finish == "length" for t in members) / count,
        "undecided": sum(float(g.rewards.max() - g.rewards.min()) > 1e-9 for g in groups) / len(groups),
    }
    for name in members[0].rewards:
        metrics[f"reward/{name}"] = sum(t.rewards[name] for t in members) / count
    return metrics
