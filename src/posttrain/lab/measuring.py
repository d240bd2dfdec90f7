"""Headroom: how often a model is right on a task before post-training, and how often one of several tries is."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from posttrain.evaluation.statistics import pass_at_k
from posttrain.evaluation.task import Task
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.engine_choice import engine_for
from posttrain.rollout.rollout import rollout


@dataclass(frozen=True)
class Headroom:
    """accuracy: share of right completions, sampled at temperature 1; domains: the same by `meta["domain"]`.

    best_of: the chance that one of `samples` completions is right. prompts, samples: how many were taken.
    parameters: of the model; steps: of its pre-training (0 where unknown).
    """

    accuracy: float
    best_of: float
    domains: dict[str, float] = field(default_factory=dict)
    prompts: int = 0
    samples: int = 0
    parameters: int = 0
    steps: int = 0


def measure(policy: CausalPolicy, task: Task, *, samples: int = 8, limit: int | None = None, seed: int = 0) -> Headroom:
    """Sample the held-out problems of a task (episodes, where it has an environment) and count the right ones."""
    prompts = task.prompts(policy.tokenizer, "heldout", limit)
    world = getattr(task, "environment", None)
    groups = rollout(engine_for(policy, rows=256), prompts, samples, task.sampling, seed, world)
    right = np.zeros((len(groups), samples))
    domains: dict[str, list[float]] = defaultdict(list)
    for i, (prompt, group) in enumerate(zip(prompts, groups, strict=True)):
        for j, t in enumerate(group.trajectories):
            right[i, j] = task.correct(task.reward.score(prompt, t.text, tokens=t.actions, finish=t.finish))
        domains[str(prompt.meta.get("domain", task.name))].append(float(right[i].mean()))
    return Headroom(
        accuracy=float(right.mean()),
        best_of=float(np.mean([pass_at_k(samples, int(row.sum()), samples) for row in right])),
        domains={name: float(np.mean(values)) for name, values in sorted(domains.items())},
        prompts=len(prompts),
        samples=samples,
        parameters=sum(p.numel() for p in policy.model.parameters()),
    )
