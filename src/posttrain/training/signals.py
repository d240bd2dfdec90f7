"""Signals: what an objective asks for beside the batch (old, reference and mismatched log-probabilities, values).

They are computed over the whole step before its first update, without gradient, in the same packed micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from posttrain.models.causal import CausalPolicy
from posttrain.models.load import load
from posttrain.models.sharded import ShardedPolicy, parameters_of, piece
from posttrain.objective.batch import Batch
from posttrain.objective.divergence import Need
from posttrain.objective.likelihood import Likelihood
from posttrain.processes import add
from posttrain.training.checkpoint import Part
from posttrain.training.critic import ValueHead
from posttrain.training.parallel import experts_of_all, micro_batches, part_of, stored
from posttrain.trajectory import Group, PosttrainError, Trajectory


class Reference:
    """The frozen policy of a stage's start: a copy, or for adapters the same model with them switched off.

    It may follow the policy: a little after every update (`decay`), or all the way after every so many (`every`).
    """

    def __init__(self, policy: CausalPolicy, decay: float | None = None, every: int | None = None) -> None:
        if (decay is not None or every is not None) and policy.adapted:
            raise PosttrainError("a reference that follows the policy needs weights of its own; set lora: 0")
        if every is not None and (every < 1 or decay is not None):
            raise PosttrainError(f"reference_every is {every}; expected a whole number from 1, and no reference_decay")
        if decay is not None and not 0 <= decay <= 1:
            raise PosttrainError(f"reference_decay is {decay}; expected a number from 0 to 1")
        self.policy, self.decay, self.every = policy, decay, every
        self.copy = None if policy.adapted else policy.frozen_copy()

    def spread(self, twin: ShardedPolicy) -> None:
        """Spread it over the processes, as the policy is whose twin is given."""
        if self.copy is None:
            self.policy = twin
        else:
            self.copy = ShardedPolicy(self.copy)

    @torch.no_grad()
    def follow(self, policy: CausalPolicy, step: int = 0) -> None:
        """After the update number `step` (from 1): reference = decay * reference + (1 - decay) * policy, where there is
        a decay; the policy itself where it is the turn.
        """
        decay = 0.0 if self.every is not None and step % self.every == 0 else self.decay
        if decay is None:
            return
        assert self.copy is not None
        theirs = parameters_of(policy)
        mine = [(name, piece(p)) for name, p in parameters_of(self.copy).items()]
        torch._foreach_lerp_([p for _, p in mine], [piece(theirs[n]).detach().to(p.dtype) for n, p in mine], 1 - decay)

    @property
    def follows(self) -> bool:
        return self.decay is not None or self.every is not None

    def tensors(self) -> dict[str, Tensor | Part]:
        """What a checkpoint must hold: nothing of a reference that stays as it was."""
        if self.copy is None or not self.follows:
            return {}
        return {f"reference/{name}": part_of(p) for name, p in parameters_of(self.copy).items()}

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        if self.copy is not None and self.follows:
            for name, parameter in parameters_of(self.copy).items():
                piece(parameter).copy_(stored(tensors, f"reference/{name}", parameter))

    @contextmanager
    def active(self) -> Iterator[CausalPolicy]:
        if self.copy is not None:
            with torch.no_grad():
                yield self.copy
        else:
            with self.policy.without_adapter() as policy:
                yield policy


def per_token(batch: Batch, budget: int, compute: Callable[[Batch], Tensor]) -> Tensor:
    """Compute a `[M]` array of the whole batch in micro-batches, without gradient, on the CPU.

    Several processes compute some of them each, and each gets the whole array.
    """
    result = torch.zeros(batch.target.numel())
    for part in micro_batches(batch, budget, keep_groups=False):
        with torch.no_grad():
            values = compute(batch.select(part.sequences)).float().cpu()
        if part.counts:
            result[batch.tokens_of(part.sequences)] = values
    return add(result)


def supply(
    needs: frozenset[Need],
    batch: Batch,
    groups: Sequence[Group],
    policy: CausalPolicy,
    reference: Reference | None,
    critic: ValueHead | None,
    teacher: CausalPolicy | None = None,
    *,
    temperature: float,
    budget: int,
) -> None:
    """Add every per-token signal that is asked for to the batch.

    Experts that the batch carries are replayed by the policy alone; `experts` among the needs records those that it
    chooses now, with the old log-probabilities.
    """

    def logp(of: CausalPolicy) -> Callable[[Batch], Tensor]:
        return lambda part: of.log_likelihood(replace(part, experts=None), temperature=temperature).logp

    def replayed(part: Batch) -> Tensor:
        return policy.log_likelihood(part, temperature=temperature).logp

    if "experts" in needs:
        batch.old_logp, batch.experts = logp_and_experts(batch, budget, policy, temperature)
    elif "old_logp" in needs:
        batch.old_logp = per_token(batch, budget, replayed)
    if "collision" in needs:

        def collision(part: Batch) -> Tensor:
            found = policy.log_likelihood(part, temperature=temperature)
            assert found.hidden is not None
            assert found.head is not None
            return found.head.collision(found.hidden)

        batch.extras["collision"] = per_token(batch, budget, collision)
    if "old_entropy" in needs:

        def entropy(part: Batch) -> Tensor:
            found = policy.log_likelihood(part, temperature=temperature, entropy=True).entropy
            assert found is not None
            return found

        batch.extras["old_entropy"] = per_token(batch, budget, entropy)
    if "value" in needs:
        assert critic is not None

        def values(part: Batch) -> Tensor:
            hidden = policy.log_likelihood(part).hidden
            assert hidden is not None
            return critic(hidden)

        batch.value = per_token(batch, budget, values)
    if "teacher_logp" in needs:
        if teacher is None:
            raise PosttrainError(
                "the method compares with a teacher; give it one: teacher=<model id, folder or policy>"
            )
        batch.teacher_logp = per_token(batch, budget, logp(teacher))
    if "reference_logp" in needs or "mismatched_kl" in needs:
        assert reference is not None
        with reference.active() as frozen:
            batch.reference_logp = per_token(batch, budget, logp(frozen))
    if "mismatched_kl" in needs:
        assert reference is not None
        other = mismatched(groups, policy.max_length)
        theirs = per_token(other, budget, logp(policy))
        with reference.active() as frozen:
            base = per_token(other, budget, logp(frozen))
        batch.extras["mismatched_kl"] = other.sum(theirs - base).mean().expand(batch.target.numel()).clone()


def logp_and_experts(
    batch: Batch, budget: int, policy: CausalPolicy, temperature: float
) -> tuple[Tensor, list[Tensor]]:
    """The policy's log-probabilities `[M]`, and the experts that it sent each sequence's tokens to."""
    sent: list[Tensor] = []

    def compute(part: Batch) -> Tensor:
        found = policy.log_likelihood(replace(part, experts=None), temperature=temperature, experts=True)
        assert found.experts is not None
        sent.extend(found.experts)
        return found.logp

    logp = per_token(batch, budget, compute)
    order = [s for part in micro_batches(batch, budget, keep_groups=False) for s in part.sequences.tolist()]
    return logp, experts_of_all(batch, dict(zip(order, sent, strict=True)))


def mismatched(groups: Sequence[Group], limit: int) -> Batch:
    """Each row's prompt with the next row's answer: what the policy thinks of answers that do not belong.

    Answers are cut where the two together exceed `limit` tokens, the model's context.
    """
    rows = [t for group in groups for t in group.trajectories]
    if len(rows) < 2:
        raise PosttrainError("KTO needs at least 2 rows a step to pair prompts with other answers; raise batch")
    shuffled = []
    for row, other in zip(rows, rows[1:] + rows[:1], strict=True):
        prompt, answer = row.tokens[: row.prompt_length], other.tokens[other.prompt_length :]
        tokens = torch.cat([prompt, answer])
        mask = torch.cat([torch.zeros(len(prompt), dtype=torch.bool), other.action_mask[other.prompt_length :]])
        shuffled.append(Group([Trajectory(tokens[:limit], mask[:limit])]))
    return Batch.of(shuffled)


def full_reference(reference: Reference, batch: Batch, temperature: float) -> Likelihood:
    """The reference's hidden states and head for a micro-batch (full-vocabulary divergences)."""
    with reference.active() as frozen:
        return frozen.log_likelihood(replace(batch, experts=None), temperature=temperature)


def load_teacher(teacher: str | Path | CausalPolicy, policy: CausalPolicy) -> CausalPolicy:
    """A frozen teacher that reads the policy's tokens."""
    found = teacher if isinstance(teacher, CausalPolicy) else load(str(teacher), device=str(policy.device))
    if found.tokenizer.get_vocab() != policy.tokenizer.get_vocab():
        raise PosttrainError(
            f"the teacher {found.name} and {policy.name} have different vocabularies; expected the same tokenizer, "
            f"since the teacher judges the policy's own tokens"
        )
    found.model.eval()
    return found
