"""The one training loop, for every method, online and offline.

A step: collect groups, supply the signals the objective needs, set the advantages over the whole step, then update
(once or several times, in minibatches, each accumulated over micro-batches that fit the token budget). Of several
processes each takes the same step and computes its share of it (see `parallel`).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from posttrain.models.causal import CausalPolicy, evaluating
from posttrain.models.sharded import Sharded
from posttrain.objective.batch import Batch, Totals
from posttrain.objective.estimator import Loss, Objective
from posttrain.objective.likelihood import Likelihood
from posttrain.processes import add_up, agree, any_of, here, same
from posttrain.rollout.engine import keep_experts
from posttrain.training import checkpoint
from posttrain.training.checks import check
from posttrain.training.collect import Collected, Offline, Online, Source
from posttrain.training.critic import ValueHead
from posttrain.training.method import Method
from posttrain.training.optim import MasterAdamW, learning_rate
from posttrain.training.parallel import (
    Piece,
    checksum,
    micro_batches,
    seed_step,
    summed,
)
from posttrain.training.progress import Best, Outcome, Progress
from posttrain.training.signals import Reference, full_reference, load_teacher, supply
from posttrain.training.track import Tracker
from posttrain.trajectory import PosttrainError

WITHOUT_CHECKPOINT = 600.0  # seconds: at most as much (and a step) of a killed run is to be done again
Evaluator = Callable[["Trainer"], dict[str, float]]  # held-out figures; `heldout_accuracy` (or -`heldout_loss`) decides


class Trainer:
    """Trains one policy by one method.

    folder: where checkpoints go (None for none). stop: asked between steps; True ends the stage with a checkpoint.
    Where weights are spread over processes `policy` has its own for rollouts and at the end alone, and `learner` is the
    one that is updated; else they are one.
    """

    def __init__(
        self,
        policy: CausalPolicy,
        method: Method,
        source: Source,
        *,
        folder: Path | None = None,
        seed: int = 0,
        tracker: Tracker | None = None,
        evaluator: Evaluator | None = None,
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        self.policy, self.method, self.source = policy, method, source
        self.objective, self.settings = copy.deepcopy(method.objective), method.settings  # parts may have state
        self.folder, self.seed, self.evaluator, self.stop = folder, seed, evaluator, stop
        self.tracker = tracker or Tracker.silent()
        self.progress, self._saved = Progress(), time.monotonic()
        needs = self.objective.needs
        check(policy, method, source, judged=evaluator is not None)
        following = (method.reference_decay, method.reference_every)
        self.reference = Reference(policy, *following) if method.wants_reference else None
        self.teacher = load_teacher(method.teacher, policy) if method.teacher is not None else None
        if isinstance(source, Offline):
            source.select(policy, self.teacher)
        self.total = self.settings.total_steps(source.rows)
        self._attach()
        self.critic = self._make_critic() if method.critic else None
        self.sharded = Sharded(policy) if here().sharded else None
        self.learner = policy if self.sharded is None else self.sharded.twin
        self._opened = any(getattr(p, "reference", False) for p in (method.rollouts, *method.shaping))
        if self.sharded is not None and self.reference is not None and not self._opened:
            self.reference.spread(self.sharded.twin)
        self.best = Best(folder, self.settings.patience, self.learner)
        named = self.learner.trainable_parameters()
        if self.critic is not None:
            named += [(f"critic.{n}", p) for n, p in self.critic.named_parameters()]
        if not named:
            raise PosttrainError("the model has no trainable parameter; unfreeze some or set lora")
        self.optimizer = MasterAdamW(named, self.settings)
        self.weights = copy.deepcopy(method.weight_rule)
        if self.weights is not None:
            updates = self.total * self.settings.updates * self.settings.minibatches
            self.weights.begin(policy, self.optimizer, updates, seed)
            self._stateful["weights"] = self.weights
        self._signals = needs
        if self.settings.updates > 1 or self.settings.minibatches > 1:
            self._signals = needs | {"old_logp"}
            if method.replay_experts == "trainer":  # before the only update there is nothing to replay
                self._signals = self._signals | {"experts"}
        if self._stale:
            self._signals = self._signals - {"old_logp"}

    @property
    def _stale(self) -> bool:
        return self.settings.staleness > 0

    def _attach(self) -> None:
        """Show an online source what its strategy and shapings may look at; each run has a copy of their state."""
        self._stateful: dict[str, Any] = {}
        if isinstance(self.source, Online):
            strategy, shaping = copy.deepcopy((self.method.rollouts, self.method.shaping))
            if self.method.replay_experts == "sampler":
                keep_experts(self.source.engine, self.method.name)
            self.source.attach(
                strategy,
                shaping,
                total=self.total,
                policy=self.policy,
                reference=self.reference.active if self.reference is not None else None,
                teacher=self.teacher,
            )
            self._stateful |= {"rollouts": strategy} | {f"shaping/{i}": s for i, s in enumerate(shaping)}
        self._stateful |= {f"objective/{i}": part for i, part in enumerate(self.objective.parts)}
        self._stateful = {name: part for name, part in self._stateful.items() if hasattr(part, "state_dict")}

    def _make_critic(self) -> ValueHead:
        width = self.policy.head().weight.shape[1]
        return ValueHead(width).to(self.policy.device)

    # -- the stage ---------------------------------------------------------------------------------------------------

    def run(self) -> Outcome:
        """Train to the end of the stage, resuming from the newest checkpoint in `folder` if there is one."""
        self._resume()
        self.learner.model.train()
        status = "finished"
        try:
            while self.progress.step < self.total:
                if self.stop():
                    status = "interrupted"
                    break
                if any_of(self.spent()):
                    status = "early"
                    break
                self.advance()
                if self._evaluate_and_decide():
                    status = "early"
                    break
                if self.progress.step < self.total and self._save_is_due():
                    self.save()
            if status == "interrupted":
                self.save()
            else:
                if self.best.restore(self.progress):
                    step = self.progress.best_step
                    self.tracker.note(f"kept the weights of step {step}, the best on held-out prompts")
            if self.sharded is not None:
                self.sharded.gather()
        finally:
            self.learner.model.eval()
            self.optimizer.close()
        return Outcome(status, self.progress)

    def spent(self) -> bool:
        """Whether a limit of the stage is reached."""
        settings, done = self.settings, self.progress
        limits = (
            (settings.budget, done.seconds),
            (settings.token_limit, done.tokens),
            (settings.rollout_limit, done.rollouts),
        )
        return any(limit is not None and spent >= limit for limit, spent in limits)

    def advance(self) -> dict[str, float]:
        """One step: collect, update, report. Returns the metrics."""
        begun = time.perf_counter()
        seed_step(self.seed, self.progress.step)
        with self._whole(isinstance(self.source, Online)):
            collected = self.source.collect(self.progress.step, self.tracker.rollout)
        metrics = self.step(collected)
        self.progress.step += 1
        self.progress.rollouts += collected.rollouts
        if collected.rollouts:
            metrics["rollouts"] = self.progress.rollouts
        self.progress.seconds += time.perf_counter() - begun
        metrics["seconds"] = time.perf_counter() - begun
        self.tracker.step(self.progress.step, self.progress.seconds, metrics, collected.groups)
        return metrics

    def step(self, collected: Collected) -> dict[str, float]:
        """Update the policy on a step's groups; returns the metrics."""
        begun = time.perf_counter()
        batch = Batch.of(collected.groups)
        batch.step, batch.total = self.progress.step, self.total
        if here().several:
            same(checksum(batch), f"the rows or rewards of step {self.progress.step}")
            seed_step(self.seed, self.progress.step, 1 + here().rank)
        # dropout is for the updates alone
        with torch.no_grad(), evaluating(self.learner.model), self._precision(), self._whole(self._opened):
            supply(
                self._signals, batch, collected.groups, self.learner, self.reference, self.critic, self.teacher,
                temperature=self._temperature, budget=self.settings.token_budget,
            )  # fmt: skip
        if self._stale:  # the old policy is the one that drew them
            batch.old_logp = batch.behaviour_logp_full
        self.objective.prepare(batch)
        rate = learning_rate(self.settings, self.progress.step, self.total)
        sums: dict[str, tuple[float, float]] = {}
        losses, norms = [], []
        with self._precision(), self.learner.recomputing(self.settings.checkpointing):
            for part in self._updates(batch):
                loss, norm = self._update(part, rate, sums)
                losses.append(loss)
                norms.append(norm)
        if self.reference is not None and self.reference.follows:
            with self._whole(self._opened):
                self.reference.follow(self.policy if self._opened else self.learner, self.progress.step + 1)
        sums = summed(sums) if here().several else sums
        figures = {name: total / count for name, (total, count) in sums.items() if count}
        if "sampler_chi2" in figures:  # the effective sample size of the importance weights, as a share
            figures["sampler_ess"] = 1 / (1 + figures["sampler_chi2"])
        tokens = sum(len(t) for t in batch.tokens)
        self.progress.tokens += tokens
        seconds = time.perf_counter() - begun
        return {
            "loss": sum(losses) / len(losses),
            "grad_norm": sum(norms) / len(norms),
            "learning_rate": rate,
            **figures,
            **collected.metrics,
            **(self.weights.metrics() if self.weights is not None else {}),
            "tokens": self.progress.tokens,
            "tokens_per_second": tokens / seconds,
            "update_seconds": seconds,
            "skipped": self.progress.skipped,
        }

    def _whole(self, wanted: bool = True) -> AbstractContextManager[object]:
        """Inside, `policy` has its weights, if it is wanted."""
        return self.sharded.whole() if self.sharded is not None and wanted else nullcontext()

    def _precision(self) -> AbstractContextManager[None]:
        """The precision in which the policy's linear layers multiply in a `with` block."""
        precision = self.method.precision
        return precision.applied(self.learner) if precision is not None else nullcontext()

    def _updates(self, batch: Batch) -> list[Batch]:
        """The minibatches of every pass over a step's rollouts, in an order fixed by seed and step."""
        if self.settings.updates == self.settings.minibatches == 1:
            return [batch]
        mix = torch.Generator().manual_seed((self.seed * 1_000_003 + self.progress.step) % (1 << 63))
        parts = []
        groups = batch.group.unique()
        for _ in range(self.settings.updates):
            order = groups[torch.randperm(len(groups), generator=mix)]
            for chunk in order.chunk(min(self.settings.minibatches, len(order))):
                parts.append(batch.select(torch.isin(batch.group, chunk).nonzero()[:, 0]))
        return parts

    def _update(self, batch: Batch, rate: float, sums: dict[str, tuple[float, float]]) -> tuple[float, float]:
        """One optimizer step: accumulate over micro-batches, clip, update. Returns loss and gradient norm."""
        totals, value = batch.totals, 0.0
        pieces = micro_batches(batch, self.settings.token_budget, keep_groups=self.objective.keep_groups)
        for part in pieces:
            loss = self.loss(batch.select(part.sequences), totals)
            value += float(loss.value) if part.counts else 0.0
            if not math.isfinite(value) and self.sharded is None:
                break  # the step is lost anyway; its gradient would be too, and its metrics
            if not math.isfinite(value) or not part.counts:
                (loss.surrogate * 0).backward()  # the others wait for this process at every layer
                continue
            for name, (total, count) in loss.metrics.items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + total, before[1] + count)
            if loss.surrogate.requires_grad:
                loss.surrogate.backward()
        value = add_up(value)
        if not math.isfinite(value):
            self.optimizer.zero()
            self._skip(f"loss is {value}")
            return value, float("nan")
        self.optimizer.reduce()
        self._normalise(batch, pieces, totals)
        if self.progress.step < self.method.critic_warmup:
            self.optimizer.only(lambda name: name.startswith("critic."))
        gradients = self.optimizer.gradients() if self.weights is not None else {}
        norm = self.optimizer.step(rate)
        if self.optimizer.usable(norm):
            self.progress.skipped_in_a_row = 0
            if self.weights is not None:
                self.weights.updated(self.optimizer, gradients)
        else:
            self._skip(f"gradient norm is {norm}", "too large" if math.isfinite(norm) else "not finite")
        return value, norm

    def _normalise(self, batch: Batch, pieces: list[Piece], totals: Totals) -> None:
        """Divide the policy's gradient by what the method's normaliser makes of a second backward pass."""
        normaliser = self.method.normaliser
        if normaliser is None:
            return
        assert isinstance(self.objective, Objective)
        kept = self.optimizer.take_gradients()
        for part in pieces:
            micro = batch.select(part.sequences).to(self.policy.device)
            likelihood = self._likelihood(micro)
            second = normaliser.surrogate(self.objective, micro, likelihood, totals)
            if self.sharded is not None and (second is None or not part.counts):
                second = likelihood.logp.sum() * 0
            if second is not None:
                second.backward()
        self.optimizer.reduce()
        norm = self.optimizer.gradient_norm()
        self.optimizer.put_gradients(kept)
        self.optimizer.divide(normaliser.divisor(norm), lambda name: not name.startswith("critic."))

    def loss(self, micro: Batch, totals: Totals) -> Loss:
        """Loss of a micro-batch whose signals and advantages are set; `totals` counts the step."""
        micro = micro.to(self.policy.device)
        return self.objective(micro, self._likelihood(micro), totals)

    def _likelihood(self, micro: Batch) -> Likelihood:
        """The policy's answer for a micro-batch, with all that the objective asks for."""
        divergence = self.objective.full_divergence
        against: Likelihood | None = None
        if divergence is not None:
            assert self.reference is not None
            against = full_reference(self.reference, micro, self._temperature)
        likelihood = self.learner.log_likelihood(
            micro,
            temperature=self._temperature,
            entropy=self.method.online or "entropy" in self._signals,
            reference=against,
            divergence=divergence.direction if divergence is not None else "reverse",
        )
        if self.critic is not None:
            assert likelihood.hidden is not None
            likelihood.value = self.critic(likelihood.hidden)
        return likelihood

    @property
    def _temperature(self) -> float:
        """Log-probabilities are taken at the sampling temperature, so that ratios compare like with like."""
        return self.settings.temperature if self.method.online and self.settings.temperature > 0 else 1.0

    def _skip(self, reason: str, fault: str = "not finite") -> None:
        self.progress.skipped += 1
        self.progress.skipped_in_a_row += 1
        self.tracker.note(f"step {self.progress.step}: {reason}; the update was skipped")
        if self.progress.skipped_in_a_row >= self.settings.max_skipped:
            raise PosttrainError(
                f"{self.settings.max_skipped} updates in a row were {fault} (last: {reason}); "
                f"lower learning_rate, or raise max_skipped"
            )

    # -- evaluation and early stopping -------------------------------------------------------------------------------

    def _evaluate_and_decide(self) -> bool:
        """Evaluate when due; True when patience has run out."""
        every, step = self.settings.evaluate_every, self.progress.step
        if not every or self.evaluator is None or step % every:
            return False
        with self._whole():
            figures: dict[str, float] = agree(self.evaluator(self))
        self.learner.model.train()
        self.tracker.evaluated(step, self.progress.seconds, figures)
        if self.weights is not None and not self.weights.settled:
            return False  # weights that are not yet as they will be are no best ones
        score = figures["heldout_accuracy"] if "heldout_accuracy" in figures else -figures["heldout_loss"]
        return self.best.judge(score, self.progress)

    # -- checkpoints -------------------------------------------------------------------------------------------------

    def _save_is_due(self) -> bool:
        """By the number of steps, or because there was none for long: what a killed run has to do again is bounded."""
        every = self.settings.checkpoint_every
        if not every:
            return False
        return any_of(time.monotonic() - self._saved > WITHOUT_CHECKPOINT) or self.progress.step % every == 0

    def save(self) -> None:
        """Write a checkpoint of everything that the rest of the stage depends on."""
        if self.folder is None:
            return
        state: dict[str, Any] = {
            "progress": self.progress.as_dict(),
            "sampler": self.source.sampler.state_dict(),
            "parts": {name: part.state_dict() for name, part in self._stateful.items()},
        }
        tensors = self.optimizer.tensors()
        if isinstance(self.source, Online) and self._stale:
            state["ahead"], drawn = self.source.ahead.state()
            tensors |= drawn
        if self.reference is not None:
            tensors |= self.reference.tensors()
        if self.weights is not None:
            tensors |= self.weights.tensors()
        checkpoint.save(self.folder, self.progress.step, tensors, state)
        self._saved = time.monotonic()
        self.best.keep(self.progress)

    def _resume(self) -> None:
        found = checkpoint.latest(self.folder) if self.folder is not None and self.folder.is_dir() else None
        same(None if found is None else str(found), "their newest checkpoint")
        if found is not None:
            tensors, state = checkpoint.load(found)
            self.optimizer.load_tensors(tensors)
            self.source.sampler.load_state_dict(state["sampler"])
            for name, part in self._stateful.items():
                part.load_state_dict(state["parts"][name])
            if self.reference is not None:
                self.reference.load_tensors(tensors)
            if self.weights is not None:
                self.weights.load_tensors(tensors)
            if isinstance(self.source, Online) and self._stale:
                self.source.ahead.restore(state["ahead"], tensors)
            self.progress = Progress(**state["progress"])
        self.best.keep(self.progress)
        self.tracker.starts(self.progress.step)
