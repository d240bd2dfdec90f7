"""Whole methods on the tiny task, in the real training loop."""

from __future__ import annotations

from typing import Any

import torch

from posttrain.models.causal import CausalPolicy
from posttrain.training.method import Method
from posttrain.training.stage import Trained, train_stage
from tiny_tasks import Scorer, letters, single_precision, tiny_policy, tiny_task


def after(method: Method, *, steps: int = 2, reward: Scorer = letters, seed: int = 0, **settings: Any) -> Trained:
    """The tiny policy after a few steps of a method, in fp32; the same policy, problems and completions for all."""
    short = {"steps": steps, "batch": 3, "group": 4, "learning_rate": 1e-3, "max_tokens": 12, **settings}
    with single_precision():
        return train_stage(tiny_policy(), method.with_settings(**short), tiny_task(reward=reward), seed=seed)


def same_weights(one: CausalPolicy, other: CausalPolicy) -> bool:
    """Bit for bit."""
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def moved(run: Trained) -> bool:
    """Whether training changed the weights."""
    return not same_weights(run.policy, tiny_policy())
