"""Methods that peers have beside the cards: hand-computed values, limits, and gradients of the papers' own losses."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from padded_world import Padded, World, float64  # noqa: F401 (a fixture)
from torch import Tensor

from posttrain import methods
from posttrain.objective.advantage import GroupNormalised
from posttrain.objective.batch import Batch
from posttrain.objective.estimator import Loss
from posttrain.training.method import Method
from posttrain.trajectory import Group, Trajectory

NAMES = ("grpo-passk", "opo", "remax", "gpg", "otb", "clip-cov", "kl-cov", "gmpo", "dppo")
pytestmark = [pytest.mark.limit(*NAMES), pytest.mark.gradient(*NAMES)]


def world_for(method: Method, seed: int) -> tuple[World, Batch]:
    world = World("prompts", seed)
    draw = torch.Generator().manual_seed(seed + 100)
    hidden = world.policy.log_likelihood(world.batch)
    assert hidden.hidden is not None
    assert hidden.head is not None
    world.batch.extras["collision"] = (
        hidden.head.logits(hidden.hidden).detach().softmax(-1).square().sum(-1)
    )  # any values will do: the loss must use what it is given
    world.batch.facts["greedy"] = torch.rand(len(world.batch), generator=draw)
    batch = world.fresh()
    batch.extras, batch.facts = dict(world.batch.extras), dict(world.batch.facts)
    method.objective.prepare(batch)
    return world, batch


def loss_of(world: World, method: Method, batch: Batch) -> Loss:
    return method.objective(batch, world.policy.log_likelihood(batch), batch.totals)


def gradients(world: World, loss: Tensor) -> dict[str, Tensor]:
    named = world.policy.parameters
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def over_groups(w: Padded, of: Callable[[list[int]], Tensor]) -> Tensor:
    advantage = torch.zeros_like(w.reward)
    for rows in w.groups:
        advantage[rows] = of(rows)
    return advantage


def token_mean(w: Padded, values: Tensor) -> Tensor:
    return (values * w.mask).sum() / w.mask.sum()


def normalised(w: Padded) -> Tensor:
    return over_groups(w, lambda g: (w.reward[g] - w.reward[g].mean()) / (w.reward[g].std() + 1e-4))


def clipped(w: Padded, advantage: Tensor, clip: float = 0.2) -> Tensor:
    ratio = (w.logp - w.old).exp()
    return -torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)


def passk(w: Padded, batch: Batch) -> Tensor:
    def best(rows: list[int]) -> Tensor:
        reward = w.reward[rows]
        order = reward.sort(descending=True).values
        found = torch.zeros(len(rows))
        found[reward.argmax()] = (order[0] - order[1]) / (reward.std() + 1e-6)
        return found

    return w.mean(clipped(w, over_groups(w, best)[:, None])).mean()


def opo(w: Padded, batch: Batch) -> Tensor:
    def of(rows: list[int]) -> Tensor:
        return w.reward[rows] - (w.lengths[rows] * w.reward[rows]).sum() / w.lengths[rows].sum()

    return token_mean(w, -over_groups(w, of)[:, None] * w.logp)


def remax(w: Padded, batch: Batch) -> Tensor:
    return token_mean(w, -(w.reward - batch.facts["greedy"])[:, None] * w.logp)


def gpg(w: Padded, batch: Batch) -> Tensor:
    undecided = sum(len(rows) for rows in w.groups if float(w.reward[rows].max() - w.reward[rows].min()) > 0)
    alpha = len(w.reward) / undecided
    return token_mean(w, -alpha * over_groups(w, lambda g: w.reward[g] - w.reward[g].mean())[:, None] * w.logp)


def otb(w: Padded, batch: Batch) -> Tensor:
    collision = torch.zeros_like(w.old)
    collision[batch.sequence, batch.place] = batch.extras["collision"]
    energy = (1 - 2 * w.old.exp() + collision) * w.mask
    weight = energy.cumsum(1)
    place = (w.mask.cumsum(1) - 1).long()  # the number of an action among its sequence's
    advantage = torch.zeros_like(w.old)
    for rows in w.groups:
        for t in range(int(w.lengths[rows].max())):
            here = [(r, int(((place[r] == t) & (w.mask[r] > 0)).nonzero()[0])) for r in rows if w.lengths[r] > t]
            if len(here) == 1:
                baseline = w.reward[rows].mean()
            else:
                top = sum(weight[r, c] * w.reward[r] for r, c in here)
                baseline = top / (sum(weight[r, c] for r, c in here) + 1e-8)
            for r, c in here:
                advantage[r, c] = w.reward[r] - baseline
    return token_mean(w, clipped(w, advantage))


def covariance(w: Padded) -> Tensor:
    advantage = normalised(w)[:, None].expand_as(w.old)
    return (advantage - token_mean(w, advantage)) * (w.old - token_mean(w, w.old))


def clip_cov(w: Padded, batch: Batch) -> Tensor:
    dropped = torch.zeros_like(w.old)
    dropped[batch.sequence, batch.place] = batch.extras["high_covariance"].double()
    found = covariance(w)
    inside = (found > 0.05) & (found < 0.5) & (w.mask > 0)
    assert 0 < int(dropped.sum()) == min(int(inside.sum()), int(0.2 * w.mask.sum()))
    assert bool(inside[dropped > 0].all())
    return token_mean(w, clipped(w, normalised(w)[:, None]) * (1 - dropped))


def kl_cov(w: Padded, batch: Batch) -> Tensor:
    found = covariance(w).masked_fill(w.mask == 0, -torch.inf).flatten()
    chosen = torch.zeros_like(found)
    chosen[found.topk(max(1, int(0.2 * w.mask.sum()))).indices] = 1
    ratio = (w.logp - w.old).exp()
    penalty = chosen.view_as(w.logp) * (w.logp - w.old).abs()
    return token_mean(w, -ratio * normalised(w)[:, None] + 0.7 * penalty)


def gmpo(w: Padded, batch: Batch) -> Tensor:
    advantage = normalised(w)
    ratio = w.logp - w.old
    sign = advantage.sign()[:, None]
    inner = sign * torch.min(sign * ratio, sign * ratio.clamp(-0.3, 0.4))
    return -(advantage * w.mean(inner).exp()).mean()


def dppo(kind: str) -> Callable[[Padded, Batch], Tensor]:
    def loss(w: Padded, batch: Batch) -> Tensor:
        now, before = w.logp.detach().exp(), w.old.exp()
        advantage = normalised(w)[:, None]
        if kind == "tv":
            far = (now - before).abs()
        else:
            far = before * (before / now).log() + (1 - before) * ((1 - before) / (1 - now)).log()
        bad = torch.where(advantage > 0, (now > before) & (far > 0.03), (now < before) & (far > 0.02))
        weight = (now / before).clamp(max=1.2) * ~bad
        return token_mean(w, -advantage * weight * w.logp)

    return loss


CASES = [
    ("grpo-passk", {}, passk),
    ("opo", {}, opo),
    ("remax", {}, remax),
    ("gpg", {}, gpg),
    ("otb", {}, otb),
    ("clip-cov", {"share": 0.2, "low": 0.05, "high": 0.5}, clip_cov),
    ("kl-cov", {"share": 0.2, "coefficient": 0.7}, kl_cov),
    ("gmpo", {"low": 0.3, "high": 0.4}, gmpo),
    ("dppo", {"low": 0.02, "high": 0.03, "truncate": 1.2}, dppo("tv")),
    ("dppo", {"divergence": "kl", "low": 0.02, "high": 0.03, "truncate": 1.2}, dppo("kl")),
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("name", "arguments", "paper"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_loss_and_gradient_equal_the_papers(name, arguments, paper, seed) -> None:
    method = methods.find(name).function(**arguments)
    world, batch = world_for(method, seed)
    loss = loss_of(world, method, batch)
    expected = paper(world.padded(), batch)
    torch.testing.assert_close(loss.value, expected.detach(), rtol=1e-9, atol=1e-9)
    wanted = gradients(world, expected)
    for key, found in gradients(world, loss.surrogate).items():
        torch.testing.assert_close(found, wanted[key], rtol=1e-9, atol=1e-9)
    assert max(float(g.abs().max()) for g in wanted.values()) > 1e-6


@pytest.mark.parametrize(("name", "arguments", "paper"), CASES, ids=lambda v: v if isinstance(v, str) else "")
def test_micro_batches_change_nothing(name, arguments, paper) -> None:
    method = methods.find(name).function(**arguments)
    world, batch = world_for(method, 2)
    whole = gradients(world, loss_of(world, method, batch).surrogate)
    parts = batch.split(12, keep_groups=method.objective.keep_groups)
    assert len(parts) > 1
    pieces = [
        gradients(world, method.objective(part, world.policy.log_likelihood(part), batch.totals).surrogate)
        for part in parts
    ]
    for key, wanted in whole.items():
        torch.testing.assert_close(sum(piece[key] for piece in pieces), wanted, rtol=1e-11, atol=1e-12)


# -- by hand, and in limits ------------------------------------------------------------------------------------------


def batch_of(lengths: list[int], rewards: list[float]) -> Batch:
    prompt = torch.tensor([3, 4])
    members = []
    for length, reward in zip(lengths, rewards, strict=True):
        tokens = torch.cat([prompt, torch.full((length,), 5)])
        members.append(Trajectory(tokens, torch.arange(len(tokens)) >= 2, reward=reward))
    batch = Batch.of([Group(members)])
    batch.reward = batch.reward.double()
    return batch


def advantage_of(method: Method, batch: Batch) -> Tensor:
    method.objective.prepare(batch)
    assert batch.advantage is not None
    return batch.advantage


def test_by_hand() -> None:
    batch = batch_of([1, 1, 2], [1.0, 0.25, 0.0])
    assert advantage_of(methods.grpo_passk(scale=False), batch).tolist() == [0.75, 0, 0, 0]
    assert advantage_of(methods.grpo_passk(scale=False), batch_of([1, 1], [1.0, 1.0])).tolist() == [0, 0]
    # lengths 1 and 3: b = (1 * 1 + 3 * 0) / 4
    torch.testing.assert_close(
        advantage_of(methods.opo(), batch_of([1, 3], [1.0, 0.0])),
        torch.tensor([0.75, -0.25, -0.25, -0.25]),
    )
    # one of two groups is undecided: alpha = 4 / 2
    two = batch_of([1, 1, 1, 1], [1.0, 0.0, 1.0, 1.0])
    two.group = torch.tensor([0, 0, 1, 1])
    assert advantage_of(methods.gpg(), two).tolist() == [1.0, -1.0, 0.0, 0.0]


def test_equal_lengths_make_opo_the_group_mean() -> None:
    batch = batch_of([3, 3, 3], [1.0, 0.0, 0.5])
    found = advantage_of(methods.opo(), batch)
    expected = advantage_of(methods.reinforce("group"), batch)
    torch.testing.assert_close(found, expected)


def test_equal_energies_make_the_optimal_token_baseline_the_group_mean() -> None:
    batch = batch_of([3, 3], [1.0, 0.0])
    batch.old_logp = torch.full((6,), 0.5).log()
    batch.extras["collision"] = torch.full((6,), 0.5)
    found = advantage_of(methods.otb(), batch)
    torch.testing.assert_close(found, torch.tensor([0.5] * 3 + [-0.5] * 3), check_dtype=False)


def test_a_sure_member_says_less_about_the_baseline() -> None:
    batch = batch_of([1, 1], [1.0, 0.0])
    batch.old_logp = torch.tensor([0.9, 0.5]).log()
    batch.extras["collision"] = torch.tensor([0.82, 0.5])  # two outcomes: p and 1 - p
    energy = [1 - 1.8 + 0.82, 1 - 1.0 + 0.5]
    baseline = energy[0] / sum(energy)
    found = advantage_of(methods.otb(), batch)
    torch.testing.assert_close(found, torch.tensor([1 - baseline, -baseline]), check_dtype=False, rtol=1e-5, atol=1e-6)


def test_gpg_without_silent_groups_is_reinforce_over_the_group_mean() -> None:
    batch = batch_of([2, 1], [1.0, 0.0])
    torch.testing.assert_close(advantage_of(methods.gpg(), batch), advantage_of(methods.reinforce("group"), batch))


def test_remax_without_a_greedy_answer_says_so() -> None:
    with pytest.raises(ValueError, match="greedy"):
        advantage_of(methods.remax(), batch_of([1, 1], [1.0, 0.0]))


def test_nothing_clipped_is_plain_grpo() -> None:
    # on the policy itself gmpo, dppo and both covariance methods (but for the dropped tokens) are GRPO
    for method, twin in (
        (methods.gmpo(), methods.grpo()),
        (methods.dppo(), methods.grpo().replace(aggregate=methods.dppo().objective.aggregate)),
        (methods.kl_cov(), methods.grpo().replace(aggregate=methods.kl_cov().objective.aggregate)),
    ):
        assert isinstance(method.objective.advantage, GroupNormalised)
        world, batch = world_for(method, 4)
        batch.old_logp = world.policy.log_likelihood(batch).logp.detach()
        found = gradients(world, loss_of(world, method, batch).surrogate)
        for key, wanted in gradients(world, loss_of(world, twin, batch).surrogate).items():
            torch.testing.assert_close(found[key], wanted, rtol=1e-12, atol=1e-14)


def test_collision_is_the_sum_of_squared_probabilities() -> None:
    world = World("prompts", 0)
    found = world.policy.log_likelihood(world.batch)
    assert found.head is not None
    assert found.hidden is not None
    wanted = found.head.logits(found.hidden).softmax(-1).square().sum(-1)
    torch.testing.assert_close(found.head.collision(found.hidden), wanted)
