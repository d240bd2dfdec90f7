"""Where a step's groups come from: a data set (offline) or rollouts scored by a reward (online)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Protocol

from posttrain.data.sampler import Sampler
from posttrain.models.causal import CausalPolicy
from posttrain.reward.reward import Reward
from posttrain.reward.shaping import Shaping
from posttrain.rollout.context import StepContext
from posttrain.rollout.engine import Engine, Progress
from posttrain.rollout.environment import Environment
from posttrain.rollout.strategy import Plain, Strategy
from posttrain.training.ahead import Ahead
from posttrain.training.parallel import score_shared
from posttrain.training.settings import Settings
from posttrain.trajectory import Group, PosttrainError, Prompt

MAX_ROUNDS = 4  # how often prompts are drawn again in place of groups that the sampler refuses


@dataclass(slots=True)
class Collected:
    """A step's groups, what was measured on the way, and how many completions were drawn for it."""

    groups: list[Group]
    metrics: dict[str, float] = field(default_factory=dict)
    rollouts: int = 0


class Source(Protocol):
    sampler: Sampler

    @property
    def rows(self) -> int: ...
    def collect(self, step: int, progress: Progress | None = None) -> Collected: ...


class Offline:
    """Rows of a data set, `settings.batch` a step; those that the sampler keeps, where it chooses some."""

    def __init__(self, groups: Sequence[Group], sampler: Sampler, settings: Settings) -> None:
        self.groups, self.sampler, self.settings = groups, sampler, settings

    @property
    def rows(self) -> int:
        return len(getattr(self.sampler, "kept", self.groups))

    def select(self, policy: CausalPolicy, teacher: CausalPolicy | None) -> None:
        """Let a sampler that chooses by what the models make of the rows look at them, before the first step."""
        if hasattr(self.sampler, "select"):
            self.sampler.select(self.groups, policy, teacher)

    def collect(self, step: int, progress: Progress | None = None) -> Collected:
        groups = [self.groups[i] for i in self.sampler.take(min(self.settings.batch, self.rows))]
        lengths = [t.actions for g in groups for t in g.trajectories]
        metrics = self.sampler.metrics() if hasattr(self.sampler, "metrics") else {}
        return Collected(groups, {"length": sum(lengths) / len(lengths), **metrics})


class Online:
    """Rollouts on `settings.batch` prompts a step, by a strategy, scored by the reward, shaped.

    They are begun `settings.staleness` steps ahead. The training loop attaches what strategy and shapings may look at.
    """

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
        self.ahead = Ahead(prompts, settings.staleness)
        self.attach(Plain(), ())

    def attach(
        self,
        strategy: Strategy,
        shaping: Sequence[Shaping],
        *,
        total: int = 1,
        policy: CausalPolicy | None = None,
        reference: Callable[[], AbstractContextManager[CausalPolicy]] | None = None,
        teacher: CausalPolicy | None = None,
    ) -> None:
        """How groups come about, and what that may look at."""
        self.strategy, self.shaping, self.total = strategy, shaping, total
        self.policy, self.reference, self.teacher = policy, reference, teacher

    @property
    def rows(self) -> int:
        return len(self.prompts)

    def collect(self, step: int, progress: Progress | None = None) -> Collected:
        wanted = min(self.settings.batch, self.rows)
        admitted: list[Group] = []
        seen: list[Group] = []
        figures: dict[str, float] = {}
        begun, failed = time.perf_counter(), sum(self.reward.errors.values())
        rollouts = self._survey(step, progress, figures)
        for round_ in range(MAX_ROUNDS):
            context = self._context(step, round_, progress, figures)
            if round_ == 0 and self.settings.staleness:
                fresh = self._drawn_ahead(wanted, context)
            else:
                rows = self.sampler.take(wanted - len(admitted))
                fresh = self.strategy([self.prompts[i] for i in rows], context)
            for shape in self.shaping:
                shape(fresh, context)
            rollouts += context.sampled
            seen += fresh
            kept = self.sampler.admit(fresh)
            admitted += kept
            # a strategy may return groups beside the prompts' own; only a refusal asks for more prompts
            if len(admitted) >= wanted or len(kept) == len(fresh):
                break
        metrics = summarise(seen) | figures
        if hasattr(self.sampler, "metrics"):
            metrics |= self.sampler.metrics()
        metrics["rollout_seconds"] = time.perf_counter() - begun
        metrics["completions_per_second"] = rollouts / metrics["rollout_seconds"]
        if errors := sum(self.reward.errors.values()) - failed:
            metrics["reward_errors"] = float(errors)
        if len(seen) != len(admitted):
            metrics["admitted"] = len(admitted) / len(seen)
        # nothing admitted after all rounds: the step goes on with what there is, and its gradient is zero
        return Collected(admitted or seen[:wanted], metrics, rollouts)

    def _drawn_ahead(self, wanted: int, context: StepContext) -> list[Group]:
        """The step's scored groups, of weights that are `staleness` updates old."""

        def of(step: int) -> StepContext:
            return self._context(step, 0, None, {})

        begin = getattr(self.reward, "begin", None)
        drawn = self.ahead.next(context.step, self.total, lambda: self.sampler.take(wanted), of, begin)
        groups = drawn.underway.groups(context.progress)
        context.sampled += drawn.sampled
        context.score(groups)
        context.metrics["staleness"] = float(min(context.step, self.settings.staleness))
        return groups

    def _survey(self, step: int, progress: Progress | None, figures: dict[str, float]) -> int:
        """Let a sampler that chooses by what the policy can do try the prompts; returns how many were drawn for it."""
        if not hasattr(self.sampler, "survey"):
            return 0
        context = self._context(step, 0, progress, figures)
        context.seed = context.derived_seed("survey")  # the step's own completions stay what they are without it
        self.sampler.survey(self.prompts, context.draw)
        return context.sampled

    def _context(self, step: int, round_: int, progress: Progress | None, figures: dict[str, float]) -> StepContext:
        return StepContext(
            step=step,
            total=self.total,
            engine=self.engine,
            sampling=self.settings.sampling,
            group=self.settings.group,
            score=score_shared(self.reward.score_groups),
            seed=(self.seed * 1_000_003 + step) * MAX_ROUNDS + round_,
            policy=self.policy,
            reference=self.reference,
            teacher=self.teacher,
            environment=self.environment,
            progress=progress,
            token_budget=self.settings.token_budget,
            weights=self.reward.weights,
            metrics=figures,
        )


def summarise(groups: Sequence[Group]) -> dict[str, float]:
    """Means over the fresh rollouts: reward and its components, length, share cut off, and the share of groups that are
    undecided, whose rewards differ. Demonstrations are no rollouts, unless there is nothing else."""
    tried = [g for g in groups if any(t.source == "policy" for t in g.trajectories)] or groups
    sampled = [t for g in groups for t in g.trajectories if t.source == "policy"]
    members = sampled or [t for g in groups for t in g.trajectories]
    if not members:
        raise PosttrainError("a rollout returned no completion")
    count = len(members)
    metrics = {
        "reward": sum(t.reward for t in members) / count,
        "length": sum(t.actions for t in members) / count,
        "truncated": sum(t.finish == "length" for t in members) / count,
        "undecided": sum(float(g.rewards.max() - g.rewards.min()) > 1e-9 for g in tried) / len(tried),
    }
    for name in members[0].rewards:
        metrics[f"reward/{name}"] = sum(t.rewards.get(name, 0.0) for t in members) / count
    return metrics
