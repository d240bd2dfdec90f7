"""Our side of a measurement: the public parts a user would put together, with their default settings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict

from torch import nn

from benchmarks import workload
from benchmarks.measurement import Step
from benchmarks.roofline import Size
from benchmarks.workload import Case
from posttrain import methods
from posttrain.data.dataset import load_dataset
from posttrain.data.sampler import Shuffled
from posttrain.models.adapters import add_lora
from posttrain.models.causal import CausalPolicy
from posttrain.models.load import load
from posttrain.reward.reward import Reward
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.training.collect import Offline, Online, Source
from posttrain.training.loop import Trainer
from posttrain.training.method import Method
from posttrain.training.track import Tracker
from posttrain.trajectory import Group, Prompt


class InOrder(Shuffled):
    """Rows as they come, so that both sides take the same ones in the same step."""

    def take(self, count: int) -> list[int]:
        chosen = [(self.taken + i) % self.rows for i in range(count)]
        self.taken += count
        return chosen


class Stopwatch(Tracker):
    """Notes when each step ended and what it was made of."""

    def __init__(self) -> None:
        super().__init__(None, 0, "", 0, show=False)
        self.done: list[Step] = []
        self.losses: list[float] = []

    def step(self, step: int, seconds: float, metrics: dict[str, float], groups: Sequence[Group]) -> None:
        ended = time.perf_counter()
        prompts = [g.trajectories[0].prompt_length for g in groups]
        parts = [[t.length - p for t in g.trajectories] for p, g in zip(prompts, groups, strict=True)]
        rewards = [t.reward for g in groups for t in g.trajectories] if "reward" in metrics else []
        self.done.append(Step(ended, list(zip(prompts, parts, strict=True)), rewards))
        self.losses.append(metrics["loss"])


def run(case: Case, steps: int, model: str) -> tuple[list[Step], float, dict[str, object]]:
    """Train `steps` steps; returns them, the loss of the first, and what to know about the model."""
    policy = add_lora(load(model), rank=case.lora) if case.lora else load(model)
    method = _method(case).with_settings(
        batch=case.batch, steps=steps, learning_rate=case.learning_rate, schedule="constant", warmup=0.0
    )
    watch = Stopwatch()
    Trainer(policy, method, _source(case, method, policy, steps), tracker=watch).run()
    about: dict[str, object] = {"precision": str(policy.dtype).removeprefix("torch."), "size": asdict(size_of(policy))}
    return watch.done, watch.losses[0], about


def _method(case: Case) -> Method:
    if case.online:
        return methods.grpo().with_settings(group=case.group, max_tokens=case.max_tokens)
    return methods.sft() if case.method == "sft" else methods.dpo()


def _source(case: Case, method: Method, policy: CausalPolicy, steps: int) -> Source:
    rows = load_dataset(workload.rows_of(case, steps), policy.tokenizer)
    sampler = InOrder(rows)
    if not case.online:
        return Offline(rows.groups, sampler, method.settings)
    engine = EmbeddedEngine(policy, rows=method.settings.rollout_rows)
    return Online(rows.prompts, sampler, method.settings, engine, Reward({"near": (_score, 1.0)}), seed=0)


def _score(completion: str, prompt: Prompt) -> float:
    return workload.reward(completion, int(prompt.answer))


def size_of(policy: CausalPolicy) -> Size:
    config = policy.base.config.get_text_config()
    vocabulary, width = policy.head().weight.shape
    return Size(
        body=sum(m.weight.numel() for m in policy.body.modules() if isinstance(m, nn.Linear)),
        vocabulary=vocabulary,
        width=width,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        head_width=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
    )
