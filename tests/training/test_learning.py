"""That training reaches what each kind of method is for, on a tiny policy."""

from __future__ import annotations

import math

import pytest
import torch

from posttrain import methods
from posttrain.trajectory import Prompt
from tiny_training import (
    FAST,
    SHORT,
    demonstrations,
    feedback,
    gradients,
    make_policy,
    offline,
    online,
    pairs,
    records,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sft_learns_its_rows(dtype: torch.dtype) -> None:
    trainer = offline(
        methods.sft().with_settings(**FAST, batch=12, steps=25), demonstrations(), make_policy(dtype=dtype)
    )
    found = records(trainer)
    assert trainer.run().status == "finished"
    assert found[0]["loss"] > 5
    assert found[-1]["loss"] < 1


def test_grpo_finds_what_is_rewarded() -> None:
    def vowels(completion: str, prompt: Prompt) -> float:
        return sum(c in "aeiou" for c in completion) / 8

    settings = {**FAST, "batch": 4, "group": 16, "max_tokens": 8, "steps": 25}
    trainer = online(methods.grpo().with_settings(**settings), reward=vowels)
    found = records(trainer)
    trainer.run()
    assert found[0]["reward"] < 0.1
    assert sum(m["reward"] for m in found[-3:]) / 3 > 0.5


def test_dpo_widens_the_margin() -> None:
    trainer = offline(methods.dpo().with_settings(**{**FAST, "learning_rate": 3e-3}, batch=12, steps=12), pairs())
    found = records(trainer)
    trainer.run()
    assert found[0]["margin"] == pytest.approx(0, abs=1e-4)
    assert found[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert found[-1]["margin"] > 5
    assert found[-1]["accuracy"] == 1


def test_kto_tells_the_desirable_from_the_others() -> None:
    trainer = offline(methods.kto().with_settings(**{**FAST, "learning_rate": 3e-3}, batch=12, steps=15), feedback())
    found = records(trainer)
    trainer.run()
    assert found[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert found[-1]["loss"] < 0.4
    assert found[-1]["accuracy"] > 0.9


def test_the_critic_of_ppo_learns_and_does_not_pull_at_the_policy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every completion earns 1, so whitened advantages are 0 and the critic's loss is all there is at first."""
    method = methods.ppo(kl=0.0, value=1.0, lam=1.0).with_settings(**{**FAST, **SHORT, "steps": 12})
    trainer = online(method, reward=lambda completion, prompt: 1.0)
    assert trainer.critic is not None
    assert not any(bool(p.any()) for p in trainer.critic.parameters()), "it starts at zero"
    taken = gradients(trainer, monkeypatch)
    found = records(trainer)
    trainer.run()
    assert len(taken) == 12 * 4
    assert found[0]["value_loss"] > 0.2
    assert found[-1]["value_loss"] < 0.05
    assert bool(taken[0]["critic.linear.bias"].any())
    assert not any(bool(g.any()) for name, g in taken[0].items() if not name.startswith("critic."))
