"""Turn-PPO, S-PPO and ST-PPO: the card's checks, limits, and the gradients of the papers' own losses."""

from __future__ import annotations

import math

import pytest
import torch
from padded_world import Padded, World, float64  # noqa: F401 (a fixture)
from torch import Tensor

from posttrain import methods
from posttrain.objective.aggregate import SequenceMean
from posttrain.objective.batch import Batch
from posttrain.objective.denominator import OldPolicy, OldPolicySequence
from posttrain.objective.likelihood import Likelihood
from posttrain.objective.turns import OldPolicyTurn, turns_of
from posttrain.training.method import Method
from posttrain.training.normaliser import ClippingBias
from posttrain.trajectory import Group, Trajectory

NAMES = ("turn-ppo", "s-ppo", "st-ppo")
pytestmark = [pytest.mark.limit(*NAMES), pytest.mark.gradient(*NAMES)]


def world_of(seed: int, turns: str = "mixed") -> tuple[World, Batch]:
    """Rollouts whose tokens are cut into turns of one to three tokens, `one` turn, or a turn a `token`."""
    world = World("prompts", seed)
    draw = torch.Generator().manual_seed(seed)
    found = []
    for length in world.batch.lengths.tolist():
        if turns == "one":
            found.append(torch.zeros(length, dtype=torch.int64))
        elif turns == "token":
            found.append(torch.arange(length))
        else:
            found.append((torch.rand(length, generator=draw) < 0.4).long().cumsum(0))
    world.batch.turn = torch.cat(found)
    return world, world.fresh()


def gradients(world: World, loss: Tensor) -> dict[str, Tensor]:
    named = world.policy.parameters
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def turn_ratio(w: Padded, turn: Tensor) -> Tensor:
    """`[S, T]`: every token's turn's geometric mean ratio, differentiable."""
    log_ratio = w.logp - w.old
    found = []
    for s in range(len(log_ratio)):
        own = torch.zeros_like(log_ratio[s])
        for k in set(turn[s][w.mask[s] > 0].tolist()):
            here = (turn[s] == k) & (w.mask[s] > 0)
            own = torch.where(here, log_ratio[s][here].mean(), own)
        found.append(own)
    return torch.stack(found).exp()


def papers(world: World, method: Method, batch: Batch, ratio: str) -> tuple[Tensor, Tensor]:
    """J (up to the critic) and the clipped tokens' share of the unclipped objective, as the paper writes them."""
    w = world.padded()
    turn, advantage = torch.zeros_like(w.mask, dtype=torch.int64), torch.zeros_like(w.mask)
    turn[batch.sequence, batch.place] = batch.turn
    assert batch.advantage is not None
    advantage[batch.sequence, batch.place] = batch.advantage
    rho = turn_ratio(w, turn) if ratio == "turn" else (w.logp - w.old).exp()
    surrogate = torch.min(rho * advantage, rho.clamp(0.8, 1.2) * advantage)
    clipped = ((advantage > 0) & (rho > 1.2)) | ((advantage < 0) & (rho < 0.8))
    return w.mean(surrogate).mean(), w.mean(torch.where(clipped, rho * advantage, 0)).mean()


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("name", "ratio"), [("turn-ppo", "turn"), ("st-ppo", "turn"), ("s-ppo", "token")])
def test_gradient_and_clipping_bias_equal_the_papers(name: str, ratio: str, seed: int) -> None:
    method = methods.find(name).function(value=0.0)
    world, batch = world_of(seed)
    method.objective.prepare(batch)
    likelihood = world.policy.log_likelihood(batch)
    loss = method.objective(batch, likelihood, batch.totals)
    objective, bias = papers(world, method, batch, ratio)
    torch.testing.assert_close(loss.value, -objective.detach(), rtol=1e-9, atol=1e-9)
    wanted = gradients(world, -objective)
    found = gradients(world, loss.surrogate)
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=1e-9, atol=1e-9)
    second = ClippingBias().surrogate(method.objective, batch, likelihood, batch.totals)
    assert second is not None
    wanted = gradients(world, bias)
    for key, value in gradients(world, second).items():
        torch.testing.assert_close(value, wanted[key], rtol=1e-9, atol=1e-9)


def test_clipped_gradient_plus_bias_is_the_unclipped_gradient() -> None:
    for method in (methods.s_ppo(value=0.0), methods.st_ppo(value=0.0)):
        world, batch = world_of(3)
        method.objective.prepare(batch)
        likelihood = world.policy.log_likelihood(batch)
        clipped = gradients(world, -method.objective(batch, likelihood, batch.totals).surrogate)
        free = method.replace(masks=()).objective
        whole = gradients(world, -free(batch, likelihood, batch.totals).surrogate)
        second = ClippingBias().surrogate(method.objective, batch, likelihood, batch.totals)
        assert second is not None
        for key, bias in gradients(world, second).items():
            torch.testing.assert_close(clipped[key] + bias, whole[key], rtol=1e-11, atol=1e-12)


def test_one_turn_is_the_sequence_ratio_and_turns_of_one_token_are_ppo() -> None:
    for turns, twin in (("one", OldPolicySequence()), ("token", OldPolicy())):
        world, batch = world_of(1, turns)
        logp = world.policy.log_likelihood(batch).logp
        found, wanted = OldPolicyTurn()(batch, logp), twin(batch, logp)
        torch.testing.assert_close(found.value, wanted.value, rtol=1e-12, atol=0)
    world, batch = world_of(1, "token")
    by_turn, by_token = methods.turn_ppo(), methods.ppo(lam=1.0, kl=0.0).replace(aggregate=SequenceMean())
    by_turn.objective.prepare(batch)
    likelihood = world.policy.log_likelihood(batch)
    found = gradients(world, by_turn.objective(batch, likelihood, batch.totals).surrogate)
    for key, wanted in gradients(world, by_token.objective(batch, likelihood, batch.totals).surrogate).items():
        torch.testing.assert_close(found[key], wanted, rtol=1e-12, atol=1e-14)


def test_by_hand() -> None:
    tokens = torch.tensor([1, 2, 3, 4])
    actions = torch.tensor([False, True, True, True])
    batch = Batch.of([Group([Trajectory(tokens, actions, turn=torch.tensor([0, 0, 0, 1]), reward=1.0)])])
    batch.old_logp = torch.tensor([-1.0, -1.0, -1.0])
    logp = torch.tensor([-0.9, -0.7, -1.0], requires_grad=True)
    assert turns_of(batch).tolist() == [0, 0, 1]
    ratio = OldPolicyTurn()(batch, logp)
    torch.testing.assert_close(ratio.value, torch.tensor([math.exp(0.2), math.exp(0.2), 1.0]))
    # clipped at 1.2 for a positive advantage: only the second turn keeps a gradient
    objective = methods.turn_ppo(value=0.0).objective
    batch.advantage = torch.tensor([1.0, 1.0, 1.0])
    batch.value = batch.returns = torch.zeros(3)
    loss = objective(batch, Likelihood(logp, value=torch.zeros(3)), batch.totals)
    torch.testing.assert_close(loss.value, torch.tensor(-(1.2 + 1.2 + 1.0) / 3))
    loss.surrogate.backward()
    torch.testing.assert_close(logp.grad, torch.tensor([0.0, 0.0, -1 / 3]))


def test_tokens_of_a_turn_share_its_credit() -> None:
    tokens, actions = torch.tensor([1, 2, 3]), torch.tensor([False, True, True])
    batch = Batch.of([Group([Trajectory(tokens, actions, reward=1.0)])])
    batch.old_logp = torch.tensor([-1.0, -1.0])
    batch.advantage, batch.value, batch.returns = torch.tensor([3.0, -1.0]), torch.zeros(2), torch.zeros(2)
    logp = torch.tensor([-1.0, -1.0], requires_grad=True)
    objective = methods.turn_ppo(value=0.0).objective
    objective(batch, Likelihood(logp, value=torch.zeros(2)), batch.totals).surrogate.backward()
    torch.testing.assert_close(logp.grad, torch.tensor([-0.5, -0.5]))  # (3 - 1) / 2 each, over two tokens


def test_nothing_clipped_means_no_division() -> None:
    world, batch = world_of(4)
    method = methods.s_ppo(clip=1e9)
    method.objective.prepare(batch)
    assert ClippingBias().surrogate(method.objective, batch, world.policy.log_likelihood(batch), batch.totals) is None
    for how in ("threshold", "triggered"):
        assert ClippingBias(how=how).divisor(0.0) == 1.0
    assert ClippingBias(2.0).divisor(5.0) == 2.5
    assert ClippingBias(2.0).divisor(1.0) == 1.0
    assert ClippingBias(how="triggered").divisor(0.1) == 0.1
    assert ClippingBias(how="triggered").divisor(1e-9) == 1e-3
