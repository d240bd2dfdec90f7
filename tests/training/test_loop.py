"""The training loop: what a step computes, whatever it is split into, and what stops it."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch

from posttrain import methods
from posttrain.models.adapters import add_lora
from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.training.collect import Collected
from posttrain.training.method import Method
from posttrain.trajectory import PosttrainError
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
    same,
    trainer_for,
    weights,
)

# -- a step ----------------------------------------------------------------------------------------------------------

EVERY = {
    "sft": methods.sft(),
    "dft": methods.dft(),
    "dpo": methods.dpo(),
    "simpo": methods.simpo(),
    "kto": methods.kto(),
    "grpo": methods.grpo(beta=0.1),
    "gspo": methods.gspo().with_settings(updates=2, minibatches=2),
    "dr-grpo": methods.dr_grpo(),
    "reinforce++": methods.reinforce_plus_plus(),
    "ppo": methods.ppo(),
}


@pytest.mark.parametrize("name", EVERY)
def test_the_token_budget_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    collected = trainer_for(EVERY[name].with_settings(**SHORT)).source.collect(0)
    results = []
    for budget in (1, 40, 1 << 20):
        trainer = trainer_for(EVERY[name].with_settings(**SHORT, **FAST, token_budget=budget))
        taken = gradients(trainer, monkeypatch)
        metrics = trainer.step(collected)
        results.append((metrics, taken, weights(trainer.policy)))
    (one, one_gradients, one_weights), *others = results
    for other, other_gradients, other_weights in others:
        for key in ("loss", "grad_norm", "logp"):
            assert one[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6), key
        for a, b in zip(one_gradients, other_gradients, strict=True):
            assert a.keys() == b.keys()
            for parameter in a:
                torch.testing.assert_close(a[parameter], b[parameter], rtol=1e-4, atol=1e-6)
        # the size of a gradient near 0 is rounding, and Adam takes it for a step: a mean tells, a maximum does not
        for parameter, value in one_weights.items():
            assert (value - other_weights[parameter]).abs().mean() < 1e-6, parameter


def test_every_token_of_the_step_weighs_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient is that of the plain mean over all answer tokens, computed row by row by transformers itself."""
    rows = demonstrations(5)
    assert len({group.trajectories[0].actions for group in rows}) > 2
    policy = make_policy()
    total = sum(group.trajectories[0].actions for group in rows)
    for group in rows:
        t = group.trajectories[0]
        logits = policy.model(t.tokens[None]).logits[0, :-1]
        lost = torch.nn.functional.cross_entropy(logits, t.tokens[1:], reduction="none")
        (lost[t.action_mask[1:]].sum() / total).backward()
    expected = {name: p.grad.clone() for name, p in policy.model.named_parameters() if p.grad is not None}

    trainer = offline(methods.sft().with_settings(batch=5, token_budget=20), rows)
    assert len(Batch.of(rows).split(20, keep_groups=False)) > 2
    found = gradients(trainer, monkeypatch)
    trainer.step(Collected(rows))
    assert found[0].keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-4, atol=1e-6)


def test_a_step_reports_what_it_did() -> None:
    trainer = online(methods.grpo().with_settings(**SHORT))
    collected = trainer.source.collect(0)
    metrics = trainer.step(collected)
    tokens = sum(t.length for g in collected.groups for t in g.trajectories)
    assert metrics["tokens"] == tokens == trainer.progress.tokens
    assert {"loss", "grad_norm", "reward", "length", "entropy", "logp", "clip_fraction", "learning_rate"} <= set(
        metrics
    )
    assert all(math.isfinite(value) for value in metrics.values())
    trainer.step(collected)
    assert trainer.progress.tokens == 2 * tokens


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_log_probabilities_are_taken_at_the_sampling_temperature(temperature: float) -> None:
    trainer = online(methods.grpo().with_settings(**SHORT, temperature=temperature))
    collected = trainer.source.collect(0)
    batch = Batch.of(collected.groups)
    metrics = trainer.step(collected)
    assert metrics["logp"] == pytest.approx(float(batch.behaviour_logp.mean()), abs=1e-5)
    other = trainer.policy.log_likelihood(batch, temperature=temperature + 0.5).logp.detach().mean()
    assert metrics["logp"] != pytest.approx(float(other), abs=1e-2)


def test_offline_log_probabilities_are_the_models_own() -> None:
    trainer = offline(methods.sft().with_settings(temperature=0.5, batch=4), demonstrations())
    collected = trainer.source.collect(0)
    expected = trainer.policy.log_likelihood(Batch.of(collected.groups)).logp.detach().mean()
    assert trainer.step(collected)["logp"] == pytest.approx(float(expected), abs=1e-5)


# -- several updates on the same rollouts ------------------------------------------------------------------------------


def test_later_updates_look_back_at_the_policy_that_sampled() -> None:
    still = online(methods.grpo().with_settings(**SHORT, updates=4, learning_rate=0.0))
    metrics = still.step(still.source.collect(0))
    assert metrics["ratio"] == pytest.approx(1.0, abs=1e-5)
    assert metrics["clip_fraction"] == 0

    moving = online(methods.grpo().with_settings(**SHORT, **{**FAST, "learning_rate": 0.05}, updates=4))
    metrics = moving.step(moving.source.collect(0))
    assert metrics["clip_fraction"] > 0.05
    assert abs(metrics["ratio"] - 1) > 1e-3

    once = online(methods.grpo().with_settings(**SHORT, **{**FAST, "learning_rate": 0.05}))
    metrics = once.step(once.source.collect(0))
    assert metrics["clip_fraction"] == 0
    assert "ratio" not in metrics, "one update needs no second forward pass"


@pytest.mark.parametrize(("updates", "minibatches", "expected"), [(1, 1, 1), (3, 1, 3), (2, 3, 6), (1, 99, 3)])
def test_updates_and_minibatches(
    updates: int, minibatches: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = online(methods.grpo().with_settings(**SHORT, updates=updates, minibatches=minibatches))
    taken = gradients(trainer, monkeypatch)
    trainer.step(trainer.source.collect(0))
    assert len(taken) == expected


def test_minibatches_hold_every_group_once_a_pass() -> None:
    trainer = online(methods.grpo().with_settings(**{**SHORT, "batch": 5}, updates=2, minibatches=2))
    batch = Batch.of(trainer.source.collect(0).groups)
    parts = trainer._updates(batch)
    numbers = [part.group.unique().tolist() for part in parts]
    assert [len(n) for n in numbers] == [3, 2, 3, 2]
    assert sorted(numbers[0] + numbers[1]) == sorted(numbers[2] + numbers[3]) == list(range(5))
    assert numbers[:2] != numbers[2:], "every pass has an order of its own"
    assert numbers == [part.group.unique().tolist() for part in trainer._updates(batch)], "fixed by seed and step"


# -- adapters and references -----------------------------------------------------------------------------------------


def test_lora_trains_the_adapter_alone() -> None:
    plain = make_policy()
    before = weights(plain)
    adapted = add_lora(plain, rank=4)
    trainer = offline(methods.sft().with_settings(**FAST, batch=4, steps=5), demonstrations(), adapted)
    assert trainer.optimizer.names
    assert all("lora_" in name for name in trainer.optimizer.names)
    first = weights(adapted)
    trainer.run()
    after = weights(adapted)
    moved = {name for name in after if not torch.equal(after[name], first[name])}
    assert moved
    assert moved <= {name for name in after if "lora_" in name}
    base = adapted.model.unload()
    assert same({n: p.detach() for n, p in base.named_parameters()}, before)


@pytest.mark.parametrize("lora", [False, True])
def test_the_reference_is_the_policy_at_the_start(lora: bool) -> None:
    start = make_policy()
    policy = add_lora(make_policy(), rank=4) if lora else make_policy()
    trainer = offline(methods.dpo().with_settings(**FAST, batch=4, steps=3), pairs(), policy)
    trainer.run()
    batch = Batch.of(pairs())
    expected = start.log_likelihood(batch).logp
    assert trainer.reference is not None
    with trainer.reference.active() as frozen:
        assert torch.equal(frozen.log_likelihood(batch).logp, expected)
    with torch.no_grad():
        assert not torch.allclose(policy.log_likelihood(batch).logp, expected, atol=1e-2)


@pytest.mark.parametrize(
    ("method", "lora", "copies"),
    [
        (methods.sft(), False, 0),
        (methods.grpo(), False, 0),
        (methods.simpo(), False, 0),
        (methods.grpo(beta=0.1), False, 1),
        (methods.dpo(), False, 1),
        (methods.kto(), False, 1),
        (methods.ppo(), False, 1),
        (methods.ppo(kl=0.0), False, 0),
        (methods.dpo(), True, 0),
    ],
)
def test_a_second_model_is_held_only_where_it_is_needed(
    method: Method, lora: bool, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    real = CausalPolicy.frozen_copy

    def counted(self: CausalPolicy) -> CausalPolicy:
        copy = real(self)
        made.append(weakref.ref(copy.model))
        return copy

    monkeypatch.setattr(CausalPolicy, "frozen_copy", counted)
    policy = add_lora(make_policy(), rank=2) if lora else make_policy()
    trainer = trainer_for(method.with_settings(**SHORT), policy)
    trainer.run()
    assert len(made) == copies
    assert all(not p.requires_grad for copy in made for p in copy().parameters())
    del trainer
    gc.collect()
    assert all(copy() is None for copy in made), "the copy goes with the stage"


# -- what is refused at once -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [methods.grpo(), methods.dr_grpo(), methods.gdpo(), methods.reinforce("group"), methods.dapo(),
     methods.reinforce_plus_plus(baseline="group")],
)  # fmt: skip
def test_group_relative_advantages_need_a_group(method: Method) -> None:
    with pytest.raises(
        PosttrainError, match=rf"{method.name.replace('+', '.')}: group is 1; group-normalised advantag"
    ):
        online(method.with_settings(group=1))


@pytest.mark.parametrize("method", [methods.reinforce(), methods.rloo(), methods.ppo(), methods.reinforce_plus_plus()])
def test_other_advantages_do_with_one_completion(method: Method) -> None:
    trainer = online(method.with_settings(**{**SHORT, **FAST, "group": 1}))
    before = weights(trainer.policy)
    metrics = trainer.step(trainer.source.collect(0))
    assert metrics["grad_norm"] > 0
    assert not same(before, weights(trainer.policy))


def test_what_cannot_work_is_refused() -> None:
    rows = demonstrations()
    with pytest.raises(PosttrainError, match="temperature is 0"):
        online(methods.grpo().with_settings(temperature=0.0))
    with pytest.raises(PosttrainError, match="patience is 2 and nothing is evaluated; set evaluate_every"):
        offline(methods.sft().with_settings(patience=2), rows)
    with pytest.raises(PosttrainError, match="evaluate_every is 3 and nothing is held out"):
        offline(methods.sft().with_settings(evaluate_every=3), rows)
    frozen = make_policy()
    frozen.model.requires_grad_(False)
    with pytest.raises(PosttrainError, match="no trainable parameter"):
        offline(methods.sft(), rows, frozen)


def test_one_row() -> None:
    trainer = offline(methods.sft().with_settings(**FAST, epochs=3), demonstrations(1))
    assert trainer.total == 3
    assert trainer.run().status == "finished"
    trainer = offline(methods.dpo().with_settings(**FAST, epochs=2), pairs(1))
    assert trainer.run().status == "finished"
    trainer = online(methods.grpo().with_settings(**{**SHORT, **FAST}), rows=1)
    assert trainer.run().status == "finished"
    with pytest.raises(PosttrainError, match=r"kto judges an answer .* 2 rows a step; got batch 8 and 1 row of data"):
        offline(methods.kto(), feedback(1))
    with pytest.raises(PosttrainError, match=r"got batch 1 and 12 rows"):
        offline(methods.kto().with_settings(batch=1), feedback())
