"""The training loop: what a step computes, whatever it is split into, and what stops it."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain import methods
from posttrain.models.adapters import add_lora
from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.objective.likelihood import Likelihood
from posttrain.training import loop
from posttrain.training.collect import Collected
from posttrain.training.loop import Trainer
from posttrain.training.method import Method
from posttrain.training.track import Tracker
from posttrain.trajectory import Group, PosttrainError, Prompt
from tiny_training import (
    demonstrations,
    feedback,
    make_dropout_policy,
    make_policy,
    offline,
    online,
    pairs,
    same,
    weights,
)

FAST: dict[str, Any] = {"learning_rate": 1e-2, "warmup": 0.0, "schedule": "constant"}
SHORT: dict[str, Any] = {"batch": 3, "group": 4, "max_tokens": 6, "steps": 2}


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


# -- learning --------------------------------------------------------------------------------------------------------


def records(trainer: Trainer) -> list[dict[str, float]]:
    """What every step reports."""
    found: list[dict[str, float]] = []
    trainer.tracker.step = lambda step, seconds, metrics, groups: found.append(metrics)  # type: ignore[method-assign]
    return found


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


# -- evaluation and early stopping -------------------------------------------------------------------------------------


def measuring(trainer: Trainer) -> dict[str, float]:
    """Samples and likelihoods on the side, as a real evaluation does."""
    from posttrain.rollout.embedded import EmbeddedEngine
    from posttrain.training.scoring import heldout_loss
    from posttrain.trajectory import Sampling
    from tiny_training import prompts

    EmbeddedEngine(trainer.policy).generate(prompts(2), 2, Sampling(max_tokens=4), seed=1)
    if trainer.method.online:
        return {"heldout_accuracy": 0.5}
    return {"heldout_loss": heldout_loss(trainer, groups_for(trainer.method)[:3])}


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo", "ppo"])
def test_evaluating_does_not_change_training(name: str) -> None:
    """With a model whose dropout draws from the global generator."""
    ends = []
    for every in (0, 1):
        method = EVERY[name].with_settings(**{**SHORT, **FAST, "steps": 4}, evaluate_every=every)
        trainer = trainer_for(method, make_dropout_policy(), evaluator=measuring)
        torch.manual_seed(5)
        trainer.run()
        assert not trainer.policy.model.training
        ends.append(weights(trainer.policy))
    assert same(*ends)


def test_signals_are_computed_without_dropout_and_updates_with_it() -> None:
    trainer = offline(methods.dpo().with_settings(**SHORT, **FAST), pairs(), make_dropout_policy())
    found = records(trainer)
    trainer.run()
    assert found[0]["margin"] != pytest.approx(0, abs=1e-3), "the policy's own pass has dropout"
    seen = set()
    trainer = online(methods.ppo().with_settings(**SHORT), make_dropout_policy())
    trainer.policy.model.train()
    likelihood = trainer.policy.log_likelihood

    def watched(*arguments: Any, **options: Any) -> Likelihood:
        seen.add((torch.is_grad_enabled(), trainer.policy.model.training))
        return likelihood(*arguments, **options)

    trainer.policy.log_likelihood = watched  # type: ignore[method-assign]
    trainer.step(trainer.source.collect(0))
    assert seen == {(False, False), (True, True)}


def scripted(scores: list[float], key: str = "heldout_accuracy") -> Callable[[Trainer], dict[str, float]]:
    given = iter(scores)
    return lambda trainer: {key: next(given)}


@pytest.mark.parametrize(
    ("scores", "status", "steps", "best"),
    [
        ([1, 3, 2, 2, 9, 9], "early", 4, 2),  # two in a row without a better one
        ([1, 2, 3, 4, 5, 6], "finished", 6, 6),
        ([5, 1, 6, 2, 3, 9], "early", 5, 3),  # one in between: goes on
        ([2, 2, 2, 9, 9, 9], "early", 3, 1),  # as good is not better
        ([1, 1, 2, 3, 4, 0], "finished", 6, 5),  # ends before patience does: still the best weights
    ],
)
@pytest.mark.parametrize("sign", [1, -1])
def test_patience(tmp_path: Path, scores: list[float], status: str, steps: int, best: int, sign: int) -> None:
    """Patience 2, and the weights that stay are those of the best evaluation."""
    key = "heldout_accuracy" if sign > 0 else "heldout_loss"
    method = methods.sft().with_settings(**FAST, batch=4, steps=6, evaluate_every=1, patience=2)
    evaluator = scripted([sign * s for s in scores], key)
    trainer = offline(method, demonstrations(), folder=tmp_path, evaluator=evaluator)
    history: list[dict[str, torch.Tensor]] = []
    trainer.tracker.step = lambda *_: history.append(weights(trainer.policy))  # type: ignore[method-assign]
    outcome = trainer.run()
    assert (outcome.status, outcome.progress.step, outcome.progress.best_step) == (status, steps, best)
    assert same(weights(trainer.policy), history[best - 1])
    assert len(list((tmp_path / "best").glob("step-*"))) == 1


def test_best_weights_survive_in_bf16_with_a_critic(tmp_path: Path) -> None:
    method = methods.ppo().with_settings(**{**SHORT, **FAST, "steps": 3}, evaluate_every=1, patience=3)
    policy = make_policy(dtype=torch.bfloat16)
    trainer = online(method, policy, folder=tmp_path, evaluator=scripted([3, 2, 1]))
    history: list[dict[str, torch.Tensor]] = []
    trainer.tracker.step = lambda *_: history.append(weights(trainer.policy))  # type: ignore[method-assign]
    trainer.run()
    assert same(weights(policy), history[0])


def test_the_best_of_lost_steps_is_forgotten(tmp_path: Path) -> None:
    """Killed after a better evaluation that no checkpoint speaks of, and resumed without reaching it again."""
    settings = {**FAST, "batch": 4, "steps": 8, "evaluate_every": 1, "patience": 8, "checkpoint_every": 4}

    def trainer(scores: list[float], **more: Any) -> Trainer:
        method = methods.sft().with_settings(**settings, **more)
        return offline(method, demonstrations(), folder=tmp_path, evaluator=scripted(scores))

    killed = trainer([1, 5, 2, 3, 4, 9])
    history: list[dict[str, torch.Tensor]] = []
    killed.tracker.step = lambda *_: history.append(weights(killed.policy))  # type: ignore[method-assign]
    with pytest.raises(StopIteration):  # in step 7; the checkpoint is of step 4, whose best is step 2
        killed.run()
    assert sorted(p.name for p in (tmp_path / "best").iterdir()) == ["step-00000002", "step-00000006"]

    resumed = trainer([], budget=1e-9)
    outcome = resumed.run()
    assert (outcome.status, outcome.progress.step, outcome.progress.best_step) == ("early", 4, 2)
    assert same(weights(resumed.policy), history[1])
    assert [p.name for p in (tmp_path / "best").iterdir()] == ["step-00000002"]


def test_a_budget_ends_the_stage_early() -> None:
    trainer = offline(methods.sft().with_settings(batch=4, steps=1000, budget=0.05), demonstrations())
    outcome = trainer.run()
    assert outcome.status == "early"
    assert 0 < outcome.progress.step < 1000
    assert outcome.progress.seconds >= 0.05
    none = offline(methods.sft().with_settings(batch=4, steps=3, budget=0), demonstrations())
    assert none.run().progress.step == 0


def test_a_stop_leaves_a_checkpoint_of_the_step(tmp_path: Path) -> None:
    method = methods.sft().with_settings(**FAST, batch=4, steps=6, checkpoint_every=2)
    whole = offline(method, demonstrations())
    whole.run()
    asked = iter([False, False, False, True])
    stopped = offline(method, demonstrations(), folder=tmp_path, stop=lambda: next(asked))
    outcome = stopped.run()
    assert (outcome.status, outcome.progress.step) == ("interrupted", 3)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000003"]
    again = offline(method, demonstrations(), make_policy(), folder=tmp_path)
    assert again.run().progress.step == 6
    assert same(weights(again.policy), weights(whole.policy))


@pytest.mark.parametrize(("every", "kept"), [(50, ["step-00000003"]), (0, [])])
def test_a_checkpoint_is_also_written_where_there_was_none_for_long(
    every: int, kept: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = methods.sft().with_settings(**FAST, batch=4, steps=4, checkpoint_every=every)
    trainer = offline(method, demonstrations(), folder=tmp_path)
    advance = trainer.advance

    def slow() -> dict[str, float]:
        if trainer.progress.step == 2:  # as if the third step took long
            monkeypatch.setattr(loop, "WITHOUT_CHECKPOINT", 0.0)
        return advance()

    monkeypatch.setattr(trainer, "advance", slow)
    trainer.run()
    assert [p.name for p in tmp_path.glob("step-*")] == kept


# -- losses that are not finite ----------------------------------------------------------------------------------------


def poisoned(weight: float, bad: set[int], steps: int, **settings: Any) -> tuple[Trainer, list[str]]:
    """A trainer of one row a step, whose loss is multiplied by `weight` in some steps."""
    rows = demonstrations(1)
    notes: list[str] = []
    tracker = Tracker(None, 0, "sft", steps, show=False, keep=notes.append)
    trainer = offline(methods.sft().with_settings(**FAST, batch=1, steps=steps, **settings), rows, tracker=tracker)
    collect = trainer.source.collect

    def poison(step: int, progress: Any = None) -> Collected:
        rows[0].trajectories[0].weight = weight if step in bad else 1.0
        return collect(step, progress)

    trainer.source.collect = poison  # type: ignore[method-assign]
    return trainer, notes


@pytest.mark.parametrize(
    ("weight", "reason"), [(float("nan"), "loss is nan"), (float("inf"), "loss is inf"), (2e37, "gradient norm is")]
)
def test_an_update_that_is_not_finite_is_skipped_and_counted(weight: float, reason: str) -> None:
    trainer, notes = poisoned(weight, {1, 3}, 5, max_skipped=2)
    history: list[dict[str, torch.Tensor]] = []
    skipped: list[float] = []

    def seen(step: int, seconds: float, metrics: dict[str, float], groups: Any) -> None:
        history.append(weights(trainer.policy))
        skipped.append(metrics["skipped"])

    trainer.tracker.step = seen  # type: ignore[method-assign]
    outcome = trainer.run()
    assert (outcome.status, outcome.progress.skipped, outcome.progress.skipped_in_a_row) == ("finished", 2, 0)
    assert skipped == [0, 1, 1, 2, 2]
    changes = [not same(a, b) for a, b in itertools.pairwise(history)]
    assert changes == [False, True, False, True]
    assert all(bool(t.isfinite().all()) for t in history[-1].values())
    assert [n.split(": ")[1] for n in notes] == ["step 1", "step 3"]
    assert all(reason in n and "skipped" in n for n in notes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_of_a_skipped_update_is_left(dtype: torch.dtype) -> None:
    """Its first micro-batches were fine: their gradients must not slip into the next update."""
    ends = []
    for spoiled in (True, False):
        rows = demonstrations(6)
        settings = {**FAST, "batch": 6, "token_budget": 1}
        trainer = offline(methods.sft().with_settings(**settings), rows, make_policy(dtype=dtype))
        if spoiled:
            shortest = min(rows, key=lambda g: g.trajectories[0].length).trajectories[0]  # the last micro-batch
            shortest.weight = float("nan")
            assert math.isnan(trainer.step(Collected(rows))["loss"])
            shortest.weight = 1.0
        trainer.step(Collected(rows))
        ends.append(weights(trainer.policy))
    assert same(*ends)


def test_too_many_skipped_in_a_row_stop_the_run_with_its_weights_intact() -> None:
    trainer, notes = poisoned(float("nan"), {1, 3, 4, 5}, 9, max_skipped=3)
    with pytest.raises(
        PosttrainError, match=r"3 updates in a row were not finite \(last: loss is nan\); lower learning"
    ):
        trainer.run()
    assert trainer.progress.skipped == 4
    assert len(notes) == 4
    assert all(bool(p.isfinite().all()) for p in trainer.policy.model.parameters())
    assert not trainer.policy.model.training


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
