"""Gradient normalisers, critic warm-up, references that follow, and parts with state, in the real loop."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from posttrain import methods
from posttrain.objective.advantage import Fixed
from posttrain.objective.batch import Batch
from posttrain.objective.mask import Kept
from posttrain.training.method import Method
from posttrain.training.normaliser import ClippingBias
from tiny_training import letters, make_policy, online


def weights(trainer) -> dict[str, torch.Tensor]:
    return {
        name: m.detach().clone() for name, m in zip(trainer.optimizer.names, trainer.optimizer.masters, strict=True)
    }


def after(method: Method, steps: int = 1, **options: Any) -> dict[str, torch.Tensor]:
    trainer = online(method.with_settings(steps=steps, learning_rate=1e-2), reward=letters, **options)
    trainer.run()
    return weights(trainer)


def test_a_normaliser_that_finds_nothing_clipped_changes_nothing() -> None:
    plain = methods.s_ppo(clip=1e9).replace(normaliser=None)
    for name, found in after(methods.s_ppo(clip=1e9)).items():
        assert torch.equal(found, after(plain)[name]), name


def test_the_divisor_divides_the_policys_gradient_and_not_the_critics(monkeypatch) -> None:
    @dataclass(frozen=True)
    class Halves(ClippingBias):
        def divisor(self, norm: float) -> float:
            assert norm > 0
            return 2.0

    def gradient(method: Method) -> dict[str, torch.Tensor]:
        trainer = online(method.with_settings(steps=1, updates=1, minibatches=1), reward=letters)
        seen: dict[str, torch.Tensor] = {}

        def take(rate: float) -> float:
            for name, master in zip(trainer.optimizer.names, trainer.optimizer.masters, strict=True):
                if master.grad is not None:
                    seen[name] = master.grad.clone()
            return 0.0

        monkeypatch.setattr(trainer.optimizer, "step", take)
        trainer.run()
        return seen

    method = methods.s_ppo(clip=0.0)  # with one update nothing moves, so nothing is clipped by itself
    monkeypatch.setattr(
        "posttrain.objective.mask.Clip.__call__",
        lambda self, batch, ratio, advantage: Kept(torch.arange(len(advantage)) % 2 == 0, torch.ones_like(advantage)),
    )
    plain, halved = gradient(method.replace(normaliser=None)), gradient(method.replace(normaliser=Halves()))
    assert any(name.startswith("critic.") for name in plain)
    for name, found in halved.items():
        expected = plain[name] if name.startswith("critic.") else plain[name] / 2
        torch.testing.assert_close(found, expected, msg=name)


def test_only_the_critic_learns_in_its_warm_up() -> None:
    method = methods.ppo(kl=0.0).replace(critic_warmup=1)
    start = weights(online(method, reward=letters))
    warmed = after(method, steps=1)
    assert all(torch.equal(warmed[n], w) == (not n.startswith("critic.")) for n, w in start.items())
    assert any(not torch.equal(w, start[n]) for n, w in after(method, steps=2).items() if not n.startswith("critic."))


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_a_reference_that_follows_is_the_moving_average(decay: float) -> None:
    method = methods.grpo(beta=0.1).replace(reference_decay=decay).with_settings(steps=2, learning_rate=1e-2)
    policy = make_policy()
    trainer = online(method, reward=letters, policy=policy)
    expected = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    for step in range(2):
        trainer.step(trainer.source.collect(step))
        for name, parameter in policy.model.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * parameter.detach()
    assert trainer.reference is not None
    assert trainer.reference.copy is not None
    for name, found in trainer.reference.copy.model.named_parameters():
        torch.testing.assert_close(found, expected[name])


@dataclass
class Counting(Fixed):
    """Advantage 1, times how many steps it has seen."""

    seen: int = field(default=0)

    def of(self, batch: Batch) -> torch.Tensor:
        self.seen += 1
        return torch.full((len(batch),), float(self.seen))

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


def test_the_state_of_parts_and_reference_is_in_the_checkpoint(tmp_path) -> None:
    method = methods.grpo(beta=0.1).replace(advantage=Counting(), reference_decay=0.5)
    method = method.with_settings(steps=4, learning_rate=1e-2, schedule="constant")
    whole = after(method, steps=4)
    trainer = online(method.with_settings(learning_rate=1e-2), reward=letters, folder=tmp_path)
    trainer.stop = lambda: trainer.progress.step == 2
    assert trainer.run().status == "interrupted"
    assert method.objective.advantage.seen == 0  # a run works on its own copy
    again = online(method, reward=letters, folder=tmp_path)
    again.run()
    for name, found in weights(again).items():
        assert torch.equal(found, whole[name]), name
