"""A tiny policy and rows of every kind, for tests of the training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from conftest import make_model, make_tokenizer
from posttrain.data.dataset import load_dataset
from posttrain.data.sampler import Sampler, Shuffled
from posttrain.models.causal import CausalPolicy
from posttrain.reward.reward import reward_from
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.training.collect import Offline, Online
from posttrain.training.loop import Trainer
from posttrain.training.method import Method
from posttrain.trajectory import Group, Prompt

TOKENIZER = make_tokenizer()
FAST: dict[str, Any] = {"learning_rate": 1e-2, "warmup": 0.0, "schedule": "constant"}
SHORT: dict[str, Any] = {"batch": 3, "group": 4, "max_tokens": 6, "steps": 2}


def make_policy(seed: int = 0, dtype: torch.dtype = torch.float32, **config: Any) -> CausalPolicy:
    return CausalPolicy(make_model(seed, **config).to(dtype), TOKENIZER, "tiny")


def make_dropout_model(seed: int = 0) -> Any:
    """A tiny GPT-2, whose dropout draws from the global generator in every training pass."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    size: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 259, "n_positions": 128}
    ends: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**size, **ends, resid_pdrop=0.2, embd_pdrop=0.2, attn_pdrop=0.0))


def make_dropout_policy() -> CausalPolicy:
    return CausalPolicy(make_dropout_model(), TOKENIZER, "gpt2")


def _rows(rows: list[dict[str, Any]], kind: str) -> list[Group]:
    return load_dataset(rows, TOKENIZER, kind=kind, chat=False).groups


def demonstrations(count: int = 12) -> list[Group]:
    """Answers of different lengths."""
    rows = [{"prompt": f"p{i}:", "completion": "abc" * (1 + i % 4) + str(i)} for i in range(count)]
    return _rows(rows, "demonstrations")


def pairs(count: int = 12) -> list[Group]:
    rows = [{"prompt": f"q{i}:", "chosen": "yes" * (1 + i % 3), "rejected": f"no {i}"} for i in range(count)]
    return _rows(rows, "preferences")


def feedback(count: int = 12) -> list[Group]:
    rows = [{"prompt": f"q{i}:", "completion": f"{i}!" * (1 + i % 3), "label": i % 2 == 0} for i in range(count)]
    return _rows(rows, "feedback")


def prompts(count: int = 8) -> list[Prompt]:
    return [Prompt(torch.tensor(TOKENIZER.encode(f"p{i}:")), text=f"p{i}:", key=i) for i in range(count)]


def letters(completion: str, prompt: Prompt) -> float:
    """Share of letters, a reward that every group differs in."""
    return sum(c.isalpha() for c in completion) / (1 + len(completion))


def offline(method: Method, groups: Sequence[Group], policy: CausalPolicy | None = None, **options: Any) -> Trainer:
    source = Offline(groups, method.sampler(groups, 0), method.settings)
    return Trainer(policy or make_policy(), method, source, **options)


def online(
    method: Method,
    policy: CausalPolicy | None = None,
    reward: Callable[[str, Prompt], float] = letters,
    sampler: Sampler | None = None,
    rows: int = 8,
    **options: Any,
) -> Trainer:
    policy = policy or make_policy()
    starts = prompts(rows)
    engine = EmbeddedEngine(policy, rows=method.settings.rollout_rows)
    source = Online(starts, sampler or Shuffled(range(rows)), method.settings, engine, reward_from(reward), seed=0)
    return Trainer(policy, method, source, **options)


def weights(policy: CausalPolicy) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in policy.model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def groups_for(method: Method) -> list[Group]:
    kinds = {"demonstrations": demonstrations, "preferences": pairs, "feedback": feedback}
    return kinds[method.data]()


def trainer_for(method: Method, policy: CausalPolicy | None = None, **options: Any) -> Trainer:
    make = online if method.online else None
    return make(method, policy, **options) if make else offline(method, groups_for(method), policy, **options)


def gradients(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The gradient of every update from now on, before it is clipped."""
    found: list[dict[str, torch.Tensor]] = []
    step = trainer.optimizer.step

    def taking(rate: float) -> float:
        found.append(
            {
                name: master.grad.clone()
                for name, master in zip(trainer.optimizer.names, trainer.optimizer.masters, strict=True)
                if master.grad is not None
            }
        )
        return step(rate)

    monkeypatch.setattr(trainer.optimizer, "step", taking)
    return found


def records(trainer: Trainer) -> list[dict[str, float]]:
    """What every step reports."""
    found: list[dict[str, float]] = []
    trainer.tracker.step = lambda step, seconds, metrics, groups: found.append(metrics)  # type: ignore[method-assign]
    return found
