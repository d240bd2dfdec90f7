"""Both sides of a comparison with TRL: the sequences, our loss on them, TRL's, and what it takes to be equal."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"

import pytest
import torch
from torch import Tensor

from conftest import make_model, make_tokenizer
from posttrain.methods import Method
from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.trajectory import Group, Trajectory

END = 2  # <|im_end|>: end of a turn, and the pad token
GENERATIONS = 4
LENGTHS = ((5, 2, 7, 1), (3, 3, 6, 2), (1, 8, 4, 4))
REWARDS = ((1.0, 0.0, 0.25, 0.0), (0.1, 0.1, 0.1, 0.1), (0.0, 1.0, 1.0, 0.5))  # the second without variance
SECOND_REWARDS = ((3.0, 1.0, 2.0, 2.0), (0.0, 7.0, 0.0, 1.0), (5.0, 5.0, 5.0, 5.0))


def draw_tokens(count: int, seed: int) -> list[int]:
    return torch.randint(3, 259, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


# a pad token inside a prompt is a token like any other
PROMPTS = [[1, *draw_tokens(4, 1), END, 1, 7], [1, 9], [1, *draw_tokens(9, 2)]]
# most completions end with the end token, one in four was cut off
COMPLETIONS = [
    [[*draw_tokens(n - 1, 10 * g + i), END if i else 5] for i, n in enumerate(lengths)]
    for g, lengths in enumerate(LENGTHS)
]
ROWS = [(g, i) for g in range(len(PROMPTS)) for i in range(GENERATIONS)]


def trajectory(prompt: list[int], completion: list[int], **parts: Any) -> Trajectory:
    tokens = torch.tensor(prompt + completion)
    return Trajectory(tokens, torch.arange(len(tokens)) >= len(prompt), **parts)


def rollouts() -> Batch:
    """The completions as groups of four, scored twice."""
    return Batch.of([
        Group([
            trajectory(PROMPTS[g], COMPLETIONS[g][i], reward=REWARDS[g][i],
                       rewards={"one": REWARDS[g][i], "two": SECOND_REWARDS[g][i]})
            for i in range(GENERATIONS)
        ])
        for g in range(len(PROMPTS))
    ])  # fmt: skip


@dataclass
class Ours:
    """The policy, and its reference, that share their weights with TRL's."""

    policy: CausalPolicy
    reference: CausalPolicy

    @torch.no_grad()
    def logp(self, batch: Batch, of: CausalPolicy | None = None, temperature: float = 1.0) -> Tensor:
        return (of or self.policy).log_likelihood(batch, temperature=temperature).logp

    def loss(self, method: Method, batch: Batch, temperature: float = 1.0) -> tuple[float, dict[str, Tensor]]:
        """Value and gradients, accumulated over micro-batches of at most 40 tokens."""
        value = 0.0
        self.policy.model.zero_grad()
        for micro in batch.split(40, keep_groups=method.objective.advantage.keep_groups):
            likelihood = self.policy.log_likelihood(micro, temperature=temperature)
            loss = method.objective(micro, likelihood, batch.totals)
            loss.surrogate.backward()
            value += float(loss.value)
        return value, gradients(self.policy.model)


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def theirs(model: torch.nn.Module, loss: Tensor) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad()
    loss.backward()
    return float(loss.detach()), gradients(model)


def assert_equal(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5, abs=1e-6)
    assert found[1].keys() == expected[1].keys()
    size = torch.stack([g.norm() for g in expected[1].values()]).norm()
    assert size > 1e-4  # or nothing was compared
    for name, wanted in expected[1].items():
        error = (found[1][name] - wanted).norm()
        assert error <= 1e-5 * wanted.norm() + 1e-6 * size, f"{name}: {float(error / wanted.norm()):.1e}"


def make_ours() -> Ours:
    tokenizer = make_tokenizer()
    policy = CausalPolicy(make_model(0), tokenizer)
    assert policy.packs
    return Ours(policy, CausalPolicy(make_model(1), tokenizer))


def trainer_options(folder: Path) -> dict[str, Any]:
    """Arguments that every one of TRL's configurations takes."""
    return {
        "output_dir": str(folder), "use_cpu": True, "bf16": False, "report_to": [], "gradient_checkpointing": False,
        "disable_tqdm": True, "per_device_train_batch_size": len(ROWS), "logging_strategy": "no", "save_strategy": "no",
    }  # fmt: skip


def dataset(**columns: list[Any]) -> Any:
    from datasets import Dataset

    return Dataset.from_dict(columns)
