"""Every method's loss and gradient against autograd on its paper's own loss, written here from the equation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from padded_world import Kind, Padded, World, float64  # noqa: F401 (a fixture)
from torch import Tensor

from posttrain.methods import find
from posttrain.objective.batch import Batch, Totals
from posttrain.objective.estimator import Loss
from posttrain.training.method import Method

Paper = Callable[[Padded], Tensor]


@dataclass(frozen=True)
class Case:
    """A method with arguments, and its paper's loss. clips: whether some tokens, not all, must be masked."""

    name: str
    paper: Paper
    arguments: dict[str, object] = field(default_factory=dict)
    clips: bool = False

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.arguments.items())])

    @property
    def method(self) -> Method:
        return find(self.name).function(**self.arguments)


# -- parts that several papers share ---------------------------------------------------------------------------------


def clipped(ratio: Tensor, advantage: Tensor, low: float, high: float) -> Tensor:
    return torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)


def k3(w: Padded) -> Tensor:
    d = w.reference - w.logp
    return d.exp() - d - 1


def token_mean(w: Padded, values: Tensor) -> Tensor:
    return (values * w.mask).sum() / w.mask.sum()


def by_group(w: Padded, reward: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    advantage = torch.empty_like(reward)
    for rows in w.groups:
        advantage[rows] = of(reward[rows])
    return advantage


def normalised(reward: Tensor) -> Tensor:
    return (reward - reward.mean()) / (reward.std() + 1e-4)


def centred(reward: Tensor) -> Tensor:
    return reward - reward.mean()


def others_subtracted(reward: Tensor) -> Tensor:
    return torch.stack([r - torch.cat([reward[:i], reward[i + 1 :]]).mean() for i, r in enumerate(reward)])


def whiten(w: Padded, values: Tensor) -> Tensor:
    flat = values[w.mask.bool()]
    return (values - flat.mean()) / (flat.var() + 1e-8).sqrt()


def remaining(w: Padded, values: Tensor) -> Tensor:
    """Sum from each token to the end of its row."""
    return (values * w.mask).flip(1).cumsum(1).flip(1)


# -- the papers ------------------------------------------------------------------------------------------------------


def sft(w: Padded) -> Tensor:
    return token_mean(w, -w.logp)


def dft(w: Padded) -> Tensor:
    return token_mean(w, -w.logp.exp().detach() * w.logp)


def reinforce(baseline: str) -> Paper:
    def paper(w: Padded) -> Tensor:
        b = {"none": torch.zeros_like(w.reward), "batch": w.reward.mean().expand_as(w.reward)}
        advantage = by_group(w, w.reward, centred) if baseline == "group" else w.reward - b[baseline]
        return token_mean(w, -advantage[:, None] * w.logp)

    return paper


def ppo(clip: float, gamma: float, lam: float, kl: float, value: float) -> Paper:
    def paper(w: Padded) -> Tensor:
        advantage = torch.zeros_like(w.old)
        for s in range(len(w.reward)):
            at = w.mask[s].nonzero()[:, 0].tolist()
            reward = [-kl * float(w.old[s, t] - w.reference[s, t]) for t in at]
            reward[-1] += float(w.reward[s])
            v = [*w.old_value[s, at].tolist(), 0.0]
            delta = [reward[i] + gamma * v[i + 1] - v[i] for i in range(len(at))]
            for i, t in enumerate(at):
                advantage[s, t] = sum((gamma * lam) ** k * d for k, d in enumerate(delta[i:]))
        returns = advantage + w.old_value
        ratio = (w.logp - w.old).exp()
        policy = -clipped(ratio, whiten(w, advantage), clip, clip)
        near = w.old_value + (w.value - w.old_value).clamp(-0.2, 0.2)
        critic = torch.max((w.value - returns) ** 2, (near - returns) ** 2) / 2
        return token_mean(w, policy + value * critic)

    return paper


def grpo(clip: float = 0.2, beta: float = 0.0) -> Paper:
    def paper(w: Padded) -> Tensor:
        advantage = by_group(w, w.reward, normalised)[:, None]
        each = -clipped((w.logp - w.old).exp(), advantage, clip, clip) + beta * k3(w)
        return w.mean(each).mean()

    return paper


def dr_grpo(clip: float, beta: float, length: int) -> Paper:
    def paper(w: Padded) -> Tensor:
        advantage = by_group(w, w.reward, centred)[:, None]
        each = -clipped((w.logp - w.old).exp(), advantage, clip, clip) + beta * k3(w)
        return w.sum(each).mean() / length

    return paper


def dapo(low: float, high: float) -> Paper:
    def paper(w: Padded) -> Tensor:
        advantage = by_group(w, w.reward, normalised)[:, None]
        each = -clipped((w.logp - w.old).exp(), advantage, low, high)
        return token_mean(w, torch.where(w.truncated[:, None], 0.0, each))

    return paper


def gspo(low: float, high: float, beta: float) -> Paper:
    def paper(w: Padded) -> Tensor:
        ratio = w.mean(w.logp - w.old).exp()
        policy = -clipped(ratio, by_group(w, w.reward, normalised), low, high)
        return (policy + beta * w.mean(k3(w))).mean()

    return paper


def cispo(high: float) -> Paper:
    def paper(w: Padded) -> Tensor:
        weight = (w.logp - w.old).exp().clamp(max=high).detach()
        return token_mean(w, -weight * by_group(w, w.reward, normalised)[:, None] * w.logp)

    return paper


def rloo(clip: float, kl: float) -> Paper:
    def paper(w: Padded) -> Tensor:
        reward = w.reward - kl * w.sum(w.old - w.reference)
        ratio = w.sum(w.logp - w.old).exp()
        return -clipped(ratio, by_group(w, reward, others_subtracted), clip, clip).mean()

    return paper


def reinforce_plus_plus(clip: float, kl: float, baseline: str) -> Paper:
    def paper(w: Padded) -> Tensor:
        reward = by_group(w, w.reward, centred) if baseline == "group" else w.reward
        advantage = whiten(w, reward[:, None] - kl * remaining(w, w.old - w.reference))
        return token_mean(w, -clipped((w.logp - w.old).exp(), advantage, clip, clip))

    return paper


def gdpo(clip: float, beta: float, weights: dict[str, float]) -> Paper:
    def paper(w: Padded) -> Tensor:
        summed = sum(weights[k] * by_group(w, r, normalised) for k, r in w.rewards.items())
        assert isinstance(summed, Tensor)
        advantage = ((summed - summed.mean()) / (summed.std() + 1e-4))[:, None]
        each = -clipped((w.logp - w.old).exp(), advantage, clip, clip) + beta * k3(w)
        return w.mean(each).mean()

    return paper


def paired(of: Callable[[Tensor, Tensor], Tensor]) -> Paper:
    """A loss of the log-ratios of chosen and rejected, summed over tokens."""
    return lambda w: of(*w.pairs(w.sum(w.logp - w.reference))).mean()


def paired_means(of: Callable[[Tensor, Tensor], Tensor], *, reference: bool = True) -> Paper:
    """A loss of log-ratios (or log-probabilities) averaged over tokens."""
    return lambda w: of(*w.pairs(w.mean(w.logp - w.reference if reference else w.logp))).mean()


def smoothed(x: Tensor, e: float) -> Tensor:
    return -(1 - e) * F.logsigmoid(x) - e * F.logsigmoid(-x)


def robust(beta: float, e: float) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(c: Tensor, r: Tensor) -> Tensor:
        return ((1 - e) * -F.logsigmoid(beta * (c - r)) - e * -F.logsigmoid(beta * (r - c))) / (1 - 2 * e)

    return loss


def orpo(beta: float) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(c: Tensor, r: Tensor) -> Tensor:
        odds_c, odds_r = c.exp() / (1 - c.exp()), r.exp() / (1 - r.exp())
        return -c - beta * torch.log(torch.sigmoid(torch.log(odds_c / odds_r)))

    return loss


def kto(beta: float, desirable: float, undesirable: float) -> Paper:
    def paper(w: Padded) -> Tensor:
        ratio = w.sum(w.logp - w.reference)
        good = desirable * (1 - torch.sigmoid(beta * (ratio - w.mismatched_kl)))
        bad = undesirable * (1 - torch.sigmoid(beta * (w.mismatched_kl - ratio)))
        return torch.where(w.label > 0, good, bad).mean()

    return paper


CASES = [
    Case("sft", sft),
    Case("dft", dft),
    Case("reinforce", reinforce("batch")),
    Case("reinforce", reinforce("none"), {"baseline": "none"}),
    Case("reinforce", reinforce("group"), {"baseline": "group"}),
    Case("ppo", ppo(0.2, 1.0, 0.95, 0.05, 0.1), clips=True),
    Case("ppo", ppo(0.1, 0.9, 0.8, 0.0, 0.5), {"clip": 0.1, "gamma": 0.9, "lam": 0.8, "kl": 0.0, "value": 0.5}, True),
    Case("grpo", grpo(), clips=True),
    Case("grpo", grpo(0.1, 0.3), {"clip": 0.1, "beta": 0.3}, True),
    Case("dr-grpo", dr_grpo(0.2, 0.0, 128), clips=True),
    Case("dr-grpo", dr_grpo(0.3, 0.3, 10), {"clip": 0.3, "beta": 0.3, "length": 10}, True),
    Case("dapo", dapo(0.2, 0.28), clips=True),
    Case("gspo", gspo(3e-4, 4e-4, 0.0), clips=True),
    Case("gspo", gspo(0.1, 0.2, 0.3), {"low": 0.1, "high": 0.2, "beta": 0.3}, True),
    Case("cispo", cispo(5.0)),
    Case("cispo", cispo(1.1), {"high": 1.1}),
    Case("rloo", rloo(0.2, 0.0), clips=True),
    Case("rloo", rloo(0.5, 0.2), {"clip": 0.5, "kl": 0.2}, True),
    Case("reinforce++", reinforce_plus_plus(0.2, 0.01, "none"), clips=True),
    Case("reinforce++", reinforce_plus_plus(0.2, 0.5, "group"), {"kl": 0.5, "baseline": "group"}, True),
    Case("reinforce++", reinforce_plus_plus(0.2, 0.0, "none"), {"kl": 0.0}, True),
    Case("gdpo", gdpo(0.2, 0.0, {"right": 1.0, "short": 1.0}), clips=True),
    Case("gdpo", gdpo(0.2, 0.3, {"right": 1.0, "short": 0.5}), {"beta": 0.3, "weights": {"short": 0.5}}, True),
    Case("dpo", paired(lambda c, r: -F.logsigmoid(0.1 * (c - r)))),
    Case("dpo", paired(lambda c, r: smoothed(0.7 * (c - r), 0.2)), {"beta": 0.7, "label_smoothing": 0.2}),
    Case("ipo", paired_means(lambda c, r: (c - r - 1 / 0.2) ** 2)),
    Case("ipo", paired_means(lambda c, r: (c - r - 1 / 1.4) ** 2), {"beta": 0.7}),
    Case("hinge-dpo", paired(lambda c, r: (1 - 0.1 * (c - r)).clamp(min=0))),
    Case("hinge-dpo", paired(lambda c, r: (1 - 2 * (c - r)).clamp(min=0)), {"beta": 2.0}),
    Case("robust-dpo", paired(robust(0.1, 0.1))),
    Case("robust-dpo", paired(lambda c, r: -F.logsigmoid(0.7 * (c - r))), {"beta": 0.7, "label_smoothing": 0.0}),
    Case("dpo-norm", paired_means(lambda c, r: -F.logsigmoid(5 * (c - r)))),
    Case("simpo", paired_means(lambda c, r: -F.logsigmoid(2 * (c - r) - 0.5), reference=False)),
    Case("simpo", paired_means(lambda c, r: smoothed(3 * (c - r) - 1, 0.1), reference=False),
         {"beta": 3.0, "gamma": 1.0, "label_smoothing": 0.1}),
    Case("orpo", paired_means(orpo(0.1), reference=False)),
    Case("orpo", paired_means(orpo(2.0), reference=False), {"beta": 2.0}),
    Case("apo-zero", paired(lambda c, r: 1 - torch.sigmoid(0.1 * c) + torch.sigmoid(0.1 * r))),
    Case("apo-down", paired(lambda c, r: torch.sigmoid(0.1 * c) + 1 - torch.sigmoid(0.1 * (c - r)))),
    Case("kto", kto(0.1, 1.0, 1.0)),
    Case("kto", kto(0.7, 1.5, 0.5), {"beta": 0.7, "desirable": 1.5, "undesirable": 0.5}),
]  # fmt: skip

COVERED = (
    "sft", "dft",
    "reinforce", "ppo", "grpo", "dr-grpo", "dapo", "gspo", "cispo", "rloo", "reinforce++", "gdpo",
    "dpo", "ipo", "hinge-dpo", "robust-dpo", "dpo-norm", "simpo", "orpo", "apo-zero", "apo-down", "kto",
)  # fmt: skip


def loss_of(world: World, method: Method, batch: Batch, totals: Totals) -> Loss:
    likelihood = world.policy.log_likelihood(batch)
    if not method.critic:
        likelihood.value = None
    return method.objective(batch, likelihood, totals)


def gradients(world: World, of: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(of, list(world.policy.parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(world.policy.parameters, found, strict=True))


def world_of(method: Method, seed: int) -> World:
    kind: Kind = method.data
    world = World(kind, seed)
    needs = method.objective.needs | ({"old_logp"} if method.online else set())
    for name in ("old_logp", "reference_logp", "value"):
        if name not in needs:  # a signal that was not asked for must not be looked at
            setattr(world.batch, name, None)
    if "mismatched_kl" not in needs:
        world.batch.extras.clear()
    return world


def complete(world: World, method: Method, seed: int) -> Padded:
    """The padded view with every signal, asked for or not."""
    world.batch = World(method.data, seed).batch
    return world.padded()


@pytest.mark.gradient(*COVERED)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradient_equal_the_papers(case: Case, seed: int) -> None:
    method = case.method
    world = world_of(method, seed)
    batch = world.fresh()
    method.objective.advantage.prepare(batch)
    loss = loss_of(world, method, batch, batch.totals)
    expected = case.paper(complete(world, method, seed))
    torch.testing.assert_close(loss.value, expected.detach(), rtol=1e-9, atol=1e-9)
    wanted = gradients(world, expected)
    for name, found in gradients(world, loss.surrogate).items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-9, atol=1e-9)
    assert max(float(g.abs().max()) for g in wanted.values()) > 1e-6  # or nothing was compared
    if case.clips:
        masked, tokens = loss.metrics["clip_fraction"]
        assert 0 < masked < tokens


@pytest.mark.parametrize("budget", [1, 12, 30])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_micro_batches_change_neither_loss_nor_gradient(case: Case, budget: int) -> None:
    method = case.method
    world = world_of(method, 2)
    batch = world.fresh()
    method.objective.advantage.prepare(batch)
    whole = loss_of(world, method, batch, batch.totals)
    parts = batch.split(budget, keep_groups=method.objective.advantage.keep_groups)
    assert len(parts) > 1
    losses = [loss_of(world, method, part, batch.totals) for part in parts]
    torch.testing.assert_close(sum(loss.value for loss in losses), whole.value, rtol=1e-11, atol=1e-12)
    summed = [gradients(world, loss.surrogate) for loss in losses]
    for name, wanted in gradients(world, whole.surrogate).items():
        torch.testing.assert_close(sum(g[name] for g in summed), wanted, rtol=1e-11, atol=1e-12)


def test_every_method_that_is_named_as_covered_has_a_case() -> None:
    assert {case.name for case in CASES} == set(COVERED)


ON_POLICY = [case for case in CASES if case.method.online and "old_logp" not in case.method.objective.needs]


@pytest.mark.parametrize("case", ON_POLICY, ids=str)
def test_before_any_update_the_old_policy_is_the_present_one(case: Case) -> None:
    # with one update a step the loop computes no old log-probabilities
    method = case.method
    world = world_of(method, 3)
    batch = world.fresh()
    batch.old_logp = None
    method.objective.advantage.prepare(batch)
    loss = loss_of(world, method, batch, batch.totals)
    padded = complete(world, method, 3)
    padded.old = padded.logp.detach()
    expected = case.paper(padded)
    torch.testing.assert_close(loss.value, expected.detach(), rtol=1e-9, atol=1e-9)
    wanted = gradients(world, expected)
    for name, found in gradients(world, loss.surrogate).items():
        torch.testing.assert_close(found, wanted[name], rtol=1e-9, atol=1e-9)
