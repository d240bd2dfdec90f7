"""Rollouts and demonstrations in one batch, in float64, seen twice: flat, as the objective computes with them, and one
sequence after the other, as papers write their losses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from padded_world import VOCABULARY, TablePolicy
from torch import Tensor

from posttrain.objective.batch import Batch
from posttrain.objective.likelihood import Likelihood
from posttrain.objective.logprob import token_statistics
from posttrain.training.method import Method
from posttrain.trajectory import Group, Source, Trajectory

Layout = Sequence[Sequence[tuple[Source, float]]]  # groups of (source, reward)
MIXED: Layout = (
    (("policy", 1.0), ("policy", 0.0), ("policy", 0.0), ("expert", 1.0)),
    (("policy", 0.0), ("policy", 0.0), ("expert", 1.0)),
    (("policy", 1.0), ("policy", 1.0), ("policy", 0.0)),
    (("expert", 1.0),),
)
EVEN: Layout = (  # as many rollouts a prompt, and the demonstrations of two prompts beside them
    (("policy", 1.0), ("policy", 0.0), ("policy", 0.0), ("expert", 1.0)),
    (("policy", 0.0), ("policy", 0.0), ("policy", 0.0), ("expert", 1.0)),
    (("policy", 1.0), ("policy", 1.0), ("policy", 0.0)),
)


@dataclass
class Seen:
    """One sequence of T action tokens. logp `[T]`, entropy `[T]` and log_p `[T, VOCABULARY]` are differentiable; old,
    reference, teacher `[T]` are not; reference_log_p `[T, VOCABULARY]` is of the first policy.
    """

    logp: Tensor
    log_p: Tensor
    old: Tensor
    reference: Tensor
    teacher: Tensor
    reference_log_p: Tensor
    reward: float
    source: Source
    group: int

    @property
    def entropy(self) -> Tensor:
        return -(self.log_p.exp() * self.log_p).sum(-1)

    @property
    def ratio(self) -> Tensor:
        return (self.logp - self.old).exp()

    def __len__(self) -> int:
        return len(self.logp)


Paper = Callable[[list[Seen]], Tensor]


class MixedWorld:
    """A batch of the layout with every signal random, the policy that is updated, and the policy it began as."""

    def __init__(self, layout: Layout = MIXED, seed: int = 0, *, on_policy: bool = False, close: float = 0.4) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.policy, self.first, self.layout = TablePolicy(seed), TablePolicy(seed + 100), layout
        batch = Batch.of([self._group(members, draw) for members in layout])
        for f in fields(batch):
            value = getattr(batch, f.name)
            if isinstance(value, Tensor) and value.dtype == torch.float32:
                setattr(batch, f.name, value.double())
        rewards = [reward for members in layout for _, reward in members]
        batch.reward = torch.tensor(rewards, dtype=torch.float64)  # exact, not by way of fp32
        batch.facts = {name: value.double() for name, value in batch.facts.items()}
        now = self.policy.log_likelihood(batch).logp.detach()
        noise = torch.randn(3, len(now), generator=draw, dtype=torch.float64) * close
        batch.old_logp = now + (0 if on_policy else noise[0])
        batch.reference_logp = now + noise[1]
        batch.teacher_logp = now + noise[2]
        self.batch = batch

    @staticmethod
    def _group(members: Sequence[tuple[Source, float]], draw: torch.Generator) -> Group:
        prompt = torch.randint(0, VOCABULARY, (int(torch.randint(1, 5, (), generator=draw)),), generator=draw)
        solved = sum(reward >= 1 for source, reward in members if source == "policy")
        made = []
        for source, reward in members:
            length = int(torch.randint(1, 8, (), generator=draw))
            tokens = torch.cat([prompt, torch.randint(0, VOCABULARY, (length,), generator=draw)])
            mask = torch.arange(len(tokens)) >= len(prompt)
            made.append(Trajectory(tokens, mask, reward=reward, source=source, facts={"solved": solved}))
        return Group(made)

    def fresh(self) -> Batch:
        """The batch as it is before `prepare`."""
        return replace(self.batch)

    def likelihood(self, batch: Batch, method: Method) -> Likelihood:
        """The policy's answer, with the divergence from the first policy where the method has one."""
        found = self.policy.log_likelihood(batch)
        wanted = method.objective.full_divergence
        if wanted is not None:
            first = self.first.log_likelihood(batch)
            assert found.hidden is not None
            assert found.head is not None
            assert first.hidden is not None
            assert first.head is not None
            against = (first.hidden.detach(), replace(first.head, weight=first.head.weight.detach()))
            found.divergence = token_statistics(
                found.hidden, batch.target, found.head, reference=against, divergence=wanted.direction
            ).divergence
        return found

    def seen(self) -> list[Seen]:
        """The sequences of the batch, in its order."""
        found, batch = [], self.batch
        assert batch.old_logp is not None
        assert batch.reference_logp is not None
        assert batch.teacher_logp is not None
        sources = [source for members in self.layout for source, _ in members]
        for s, tokens in enumerate(batch.tokens):
            mine = batch.sequence == s
            place = batch.place[mine]
            log_p, first = (self._log_p(policy, tokens, place) for policy in (self.policy, self.first))
            found.append(
                Seen(
                    log_p.gather(1, tokens[place, None])[:, 0],
                    log_p,
                    batch.old_logp[mine],
                    batch.reference_logp[mine],
                    batch.teacher_logp[mine],
                    first.detach(),
                    float(batch.reward[s]),
                    sources[s],
                    int(batch.group[s]),
                )
            )
        return found

    @staticmethod
    def _log_p(policy: TablePolicy, tokens: Tensor, place: Tensor) -> Tensor:
        hidden = policy.hidden(tokens[place - 1], place)
        return (hidden @ policy.parameters["head"].T + policy.parameters["bias"]).log_softmax(-1)

    # -- what is compared --------------------------------------------------------------------------------------------

    def gradient(self, loss: Tensor) -> list[Tensor]:
        parameters = list(self.policy.parameters.values())
        return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))

    def of_method(self, method: Method, budget: int | None = None) -> tuple[Tensor, list[Tensor]]:
        """Loss and gradient by the method's objective; budget: added up over micro-batches of so many tokens."""
        batch = self.fresh()
        method.objective.prepare(batch)
        parts = [batch] if budget is None else batch.split(budget, keep_groups=method.objective.keep_groups)
        assert budget is None or len(parts) > 1
        losses = [method.objective(part, self.likelihood(part, method), batch.totals) for part in parts]
        gradients = [self.gradient(loss.surrogate) for loss in losses]
        return torch.stack([loss.value for loss in losses]).sum(), [
            torch.stack(each).sum(0) for each in zip(*gradients, strict=True)
        ]

    def of_paper(self, paper: Paper) -> tuple[Tensor, list[Tensor]]:
        loss = paper(self.seen())
        return loss.detach(), self.gradient(loss)


def assert_same(
    found: tuple[Tensor, list[Tensor]], wanted: tuple[Tensor, list[Tensor]], tolerance: float = 1e-9
) -> None:
    """Loss and gradient are equal, and the gradient is not zero."""
    torch.testing.assert_close(found[0], wanted[0], rtol=tolerance, atol=tolerance)
    assert_same_gradient(found[1], wanted[1], tolerance)


def assert_same_gradient(found: list[Tensor], wanted: list[Tensor], tolerance: float = 1e-9) -> None:
    assert max(float(g.abs().max()) for g in wanted) > 1e-6  # or nothing was compared
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# -- pieces that several papers share --------------------------------------------------------------------------------


def rollouts(seen: list[Seen]) -> list[Seen]:
    return [s for s in seen if s.source == "policy"]


def experts(seen: list[Seen]) -> list[Seen]:
    return [s for s in seen if s.source == "expert"]


def group_of(seen: list[Seen], one: Seen) -> list[Seen]:
    return [s for s in seen if s.group == one.group]


def normalised(one: Seen, among: list[Seen], eps: float = 1e-6) -> float:
    """(R - mean) / (unbiased deviation + eps) over the members of its group among some sequences."""
    rewards = torch.tensor([s.reward for s in group_of(among, one)], dtype=torch.float64)
    return float((one.reward - rewards.mean()) / (rewards.std() + eps)) if len(rewards) > 1 else 0.0


def centred(one: Seen, among: list[Seen]) -> float:
    rewards = [s.reward for s in group_of(among, one)]
    return one.reward - sum(rewards) / len(rewards)


def clipped(ratio: Tensor, advantage: float, low: float = 0.2, high: float = 0.2) -> Tensor:
    return torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def pooled(values: list[Tensor]) -> Tensor:
    """Mean over the tokens of all sequences."""
    return torch.cat(values).mean()
