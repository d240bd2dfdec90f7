"""How a stage is judged on the way and how it ends: patience, budgets, stops, losses that are not finite."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain import methods
from posttrain.objective.likelihood import Likelihood
from posttrain.training import loop
from posttrain.training.collect import Collected
from posttrain.training.loop import Trainer
from posttrain.training.method import Method
from posttrain.training.track import Tracker
from posttrain.trajectory import PosttrainError
from tiny_training import (
    FAST,
    SHORT,
    demonstrations,
    groups_for,
    make_dropout_policy,
    make_policy,
    offline,
    online,
    pairs,
    records,
    same,
    trainer_for,
    weights,
)

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


@pytest.mark.parametrize("method", [methods.sft(), methods.dpo(), methods.grpo(beta=0.1), methods.ppo()])
def test_evaluating_does_not_change_training(method: Method) -> None:
    """With a model whose dropout draws from the global generator."""
    ends = []
    for every in (0, 1):
        watched = method.with_settings(**{**SHORT, **FAST, "steps": 4}, evaluate_every=every)
        trainer = trainer_for(watched, make_dropout_policy(), evaluator=measuring)
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
