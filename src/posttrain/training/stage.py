"""Training a policy on a task in memory: what studies, comparisons and the lab use, without a run folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from posttrain.evaluation.task import Task
from posttrain.models.adapters import add_lora
from posttrain.models.causal import CausalPolicy
from posttrain.reward.reward import Reward
from posttrain.rollout.engine_choice import engine_for
from posttrain.training.collect import Offline, Online, Source
from posttrain.training.loop import Trainer
from posttrain.training.method import Method, Pipeline, stages_of
from posttrain.training.track import Tracker
from posttrain.trajectory import Group, Prompt

Measure = Callable[[CausalPolicy], dict[str, float]]


@dataclass(frozen=True, slots=True)
class Point:
    """Figures measured during training: after `step` optimizer steps over all stages, `seconds` of training (without
    the measuring), `tokens` trained on and `rollouts` drawn.
    """

    step: int
    seconds: float
    tokens: int
    rollouts: int
    figures: dict[str, float]


@dataclass
class Trained:
    """A trained policy. curve: what was measured on the way. metrics: the loop's own figures, a row a step."""

    policy: CausalPolicy
    curve: list[Point] = field(default_factory=list)
    metrics: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    rollouts: int = 0
    steps: int = 0


def train_stage(
    policy: CausalPolicy,
    method: Method | Pipeline,
    task: Task,
    *,
    seed: int = 0,
    evaluate: Measure | None = None,
    every: int = 0,
    show: bool = False,
) -> Trained:
    """Train `policy` in place by a method or several after one another, each within the limits of its settings.

    evaluate: measures the policy before the first step, every `every` steps and at the end (`Trained.curve`).
    show: a progress display.
    """
    result = Trained(policy)
    if evaluate is not None:
        result.curve.append(Point(0, 0.0, 0, 0, evaluate(policy)))
    for i, stage in enumerate(stages_of(method)):
        policy = _one(policy, stage, task, seed * 1_000 + i, result, evaluate, every, show)
    result.policy = policy
    return result


def source_for(policy: CausalPolicy, method: Method, task: Task, *, seed: int, reward: Reward | None = None) -> Source:
    """Where a method's groups come from on a task: rollouts on its training problems, or their demonstrations."""
    settings = method.settings
    if not method.online:
        rows: list[Group] = task.demonstrations(policy.tokenizer, settings.rows)
        return Offline(rows, method.sampler(rows, seed), settings)
    prompts: list[Prompt] = task.prompts(
        policy.tokenizer, "train", settings.rows, demonstrations=method.wants_demonstrations
    )
    engine = engine_for(policy, rows=settings.rollout_rows)
    own = task.reward.afresh() if reward is None else reward
    return Online(prompts, method.sampler(prompts, seed), settings, engine, own, seed, task.environment)


def _one(
    policy: CausalPolicy,
    method: Method,
    task: Task,
    seed: int,
    result: Trained,
    evaluate: Measure | None,
    every: int,
    show: bool,
) -> CausalPolicy:
    from transformers import set_seed

    set_seed(seed % (1 << 32))
    settings = method.settings
    if not settings.lora:
        policy.model.requires_grad_(True)
    trained = add_lora(policy, rank=settings.lora, seed=seed) if settings.lora else policy
    recorder = _Recorder(method, result, evaluate, every, show)
    source = source_for(trained, method, task, seed=seed)
    quiet = method.with_settings(evaluate_every=0, patience=0)
    trainer = Trainer(trained, quiet, source, seed=seed, tracker=recorder, stop=recorder.between)
    recorder.trainer, recorder.total = trainer, trainer.total
    with recorder:
        trainer.run()
    recorder.end()
    if settings.lora:
        return CausalPolicy(trained.model.merge_and_unload(), policy.tokenizer, policy.name)
    return policy


class _Recorder(Tracker):
    """Keeps the metrics of every step, and measures when it is due."""

    def __init__(self, method: Method, result: Trained, evaluate: Measure | None, every: int, show: bool) -> None:
        super().__init__(None, 0, method.name, 0, show=show)
        self.result, self.evaluate, self.every = result, evaluate, every
        self.before = (result.steps, result.seconds, result.tokens, result.rollouts)
        self.trainer: Trainer | None = None

    def step(self, step: int, seconds: float, metrics: dict[str, float], groups: Sequence[Group]) -> None:
        self.result.metrics.append(metrics)
        super().step(step, seconds, metrics, groups)

    def between(self) -> bool:
        """Asked between steps; never stops."""
        step = self._count()
        if self.every and self.evaluate is not None and step > self.before[0] and step % self.every == 0:
            self._measure()
        return False

    def end(self) -> None:
        self._count()
        if self.evaluate is not None and self.result.curve[-1].step != self.result.steps:
            self._measure()

    def _count(self) -> int:
        assert self.trainer is not None
        done, (steps, seconds, tokens, rollouts) = self.trainer.progress, self.before
        result = self.result
        result.steps, result.seconds = steps + done.step, seconds + done.seconds
        result.tokens, result.rollouts = tokens + done.tokens, rollouts + done.rollouts
        return result.steps

    def _measure(self) -> None:
        assert self.evaluate is not None
        assert self.trainer is not None
        result, policy = self.result, self.trainer.policy
        policy.model.eval()
        figures = self.evaluate(policy)
        policy.model.train()
        result.curve.append(Point(result.steps, result.seconds, result.tokens, result.rollouts, figures))
