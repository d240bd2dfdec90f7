"""Every method in a limit where it must equal another one, or a loss that is known."""

from __future__ import annotations

import pytest
import torch
from padded_world import Kind, World, float64  # noqa: F401 (a fixture)
from torch import Tensor

from posttrain import methods
from posttrain.methods import Method
from posttrain.objective.batch import Batch

Gradient = dict[str, Tensor]


def gradient(world: World, method: Method, batch: Batch | None = None, **signals: object) -> Gradient:
    """The method's gradient on the world's batch (or on a part of it), with some signals changed."""
    batch = world.fresh() if batch is None else batch
    for name, value in signals.items():
        setattr(batch, name, value)
    method.objective.prepare(batch)
    likelihood = world.policy.log_likelihood(batch)
    return of_loss(world, method.objective(batch, likelihood, batch.totals).surrogate)


def of_loss(world: World, loss: Tensor) -> Gradient:
    parameters = world.policy.parameters
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(parameters, found, strict=True))


def assert_equal(found: Gradient, wanted: Gradient, factor: float = 1.0) -> None:
    assert max(float(g.abs().max()) for g in wanted.values()) > 1e-6  # or nothing was compared
    for name, each in found.items():
        torch.testing.assert_close(each, factor * wanted[name], rtol=1e-9, atol=1e-12)


def at_the_reference(kind: Kind) -> World:
    """A world whose policy has not moved from the reference yet."""
    world = World(kind)
    world.batch.reference_logp = world.policy.log_likelihood(world.batch).logp.detach()
    return world


def zeros(world: World) -> Tensor:
    return torch.zeros(world.batch.target.numel(), dtype=torch.float64)


# -- demonstrations and rewards --------------------------------------------------------------------------------------


@pytest.mark.limit("sft", "reinforce")
def test_reinforce_with_equal_rewards_and_no_baseline_is_imitation() -> None:
    world = World("prompts")
    ones = torch.ones_like(world.batch.reward)
    assert_equal(gradient(world, methods.reinforce("none"), reward=ones), gradient(world, methods.sft()))


@pytest.mark.limit("dft")
def test_dft_raises_the_mean_probability() -> None:
    world = World("demonstrations")
    padded = world.padded()
    probability = (padded.logp.exp() * padded.mask).sum() / padded.mask.sum()
    assert_equal(gradient(world, methods.dft()), of_loss(world, -probability))


@pytest.mark.limit("ppo", "reinforce++")
def test_ppo_without_critic_or_discount_is_reinforce_plus_plus() -> None:
    world = World("prompts")
    ppo = methods.ppo(clip=0.1, gamma=1.0, lam=1.0, kl=0.3, value=0.0)
    assert_equal(
        gradient(world, ppo, value=zeros(world)), gradient(world, methods.reinforce_plus_plus(clip=0.1, kl=0.3))
    )


@pytest.mark.limit("gspo", "grpo")
def test_gspo_of_completions_of_one_token_is_grpo() -> None:
    world = World("prompts", length=1)
    assert_equal(gradient(world, methods.gspo(0.2, 0.2, beta=0.3)), gradient(world, methods.grpo(0.2, beta=0.3)))


@pytest.mark.limit("dapo", "grpo")
def test_dapo_with_an_even_band_is_grpo_where_lengths_are_equal_and_nothing_was_cut_off() -> None:
    world = World("prompts", length=4)
    world.batch.truncated[:] = False
    assert_equal(gradient(world, methods.dapo(0.2, 0.2)), gradient(world, methods.grpo(0.2)))


@pytest.mark.limit("cispo", "grpo")
def test_without_bounds_cispo_is_grpo_where_lengths_are_equal() -> None:
    world = World("prompts", length=4)
    assert_equal(gradient(world, methods.cispo(high=1e9)), gradient(world, methods.grpo(clip=1e9)))


@pytest.mark.limit("dr-grpo", "grpo")
def test_dr_grpo_is_grpo_times_the_spread_where_lengths_are_equal() -> None:
    world = World("prompts", length=4)
    reward = world.batch.reward.clone()
    for number in world.batch.group.unique():
        own = world.batch.group == number
        if reward[own].std() > 0:
            reward[own] *= 2 / reward[own].std()
    dr_grpo = gradient(world, methods.dr_grpo(length=4), reward=reward)
    assert_equal(dr_grpo, gradient(world, methods.grpo(), reward=reward), factor=2 + 1e-4)


@pytest.mark.limit("rloo", "dr-grpo")
def test_rloo_of_completions_of_one_token_is_a_scaled_dr_grpo() -> None:
    world = World("prompts", length=1)
    size = torch.bincount(world.batch.group)[world.batch.group].double()
    smaller = world.batch.reward * (size - 1) / size
    assert_equal(gradient(world, methods.rloo(), reward=smaller), gradient(world, methods.dr_grpo(length=1)))


@pytest.mark.limit("gdpo", "grpo")
def test_gdpo_of_a_single_reward_is_grpo_over_the_spread_of_its_advantages() -> None:
    world = World("prompts")
    reward, group = world.batch.reward, world.batch.group
    advantage = torch.empty_like(reward)
    for number in group.unique():
        own = reward[group == number]
        advantage[group == number] = (own - own.mean()) / (own.std() + 1e-4)
    found = gradient(world, methods.gdpo(), rewards={"only": reward})
    assert_equal(found, gradient(world, methods.grpo()), factor=1 / (float(advantage.std()) + 1e-4))


# -- preferences -----------------------------------------------------------------------------------------------------


@pytest.mark.limit("dpo", "robust-dpo")
def test_robust_dpo_without_flipped_labels_is_dpo() -> None:
    world = World("preferences")
    assert_equal(gradient(world, methods.robust_dpo(0.3, label_smoothing=0.0)), gradient(world, methods.dpo(0.3)))


@pytest.mark.limit("dpo-norm", "dpo")
def test_length_normalised_dpo_is_dpo_with_another_strength_where_lengths_are_equal() -> None:
    world = World("preferences", length=5)
    assert_equal(gradient(world, methods.dpo_norm(beta=1.5)), gradient(world, methods.dpo(beta=0.3)))


@pytest.mark.limit("simpo", "dpo-norm")
def test_simpo_without_a_margin_is_length_normalised_dpo_with_a_reference_that_says_nothing() -> None:
    world = World("preferences")
    dpo_norm = gradient(world, methods.dpo_norm(beta=2.0), reference_logp=zeros(world))
    assert_equal(gradient(world, methods.simpo(beta=2.0, gamma=0.0)), dpo_norm)


@pytest.mark.limit("hinge-dpo", "dpo")
def test_at_the_reference_hinge_dpo_is_twice_dpo() -> None:
    world = at_the_reference("preferences")
    assert_equal(gradient(world, methods.hinge_dpo(0.3)), gradient(world, methods.dpo(0.3)), factor=2)


@pytest.mark.limit("ipo", "dpo-norm")
def test_at_the_reference_ipo_is_length_normalised_dpo_of_the_inverse_strength() -> None:
    world = at_the_reference("preferences")
    assert_equal(gradient(world, methods.ipo(0.4)), gradient(world, methods.dpo_norm(beta=2 / 0.4)))


@pytest.mark.limit("apo-zero", "dpo")
def test_at_the_reference_apo_zero_is_half_of_dpo() -> None:
    world = at_the_reference("preferences")
    assert_equal(gradient(world, methods.apo_zero(0.3)), gradient(world, methods.dpo(0.3)), factor=0.5)


@pytest.mark.limit("apo-down")
def test_at_the_reference_apo_down_lowers_the_rejected_answers_alone() -> None:
    world = at_the_reference("preferences")
    padded = world.padded()
    _, rejected = padded.pairs(padded.sum(padded.logp))
    assert_equal(gradient(world, methods.apo_down(0.3)), of_loss(world, 0.3 / 4 * rejected.mean()))


@pytest.mark.limit("orpo", "sft")
def test_orpo_without_the_odds_is_imitation_of_the_chosen_where_lengths_are_equal() -> None:
    world = World("preferences", length=3)
    chosen = (world.batch.label > 0).nonzero()[:, 0]
    assert_equal(gradient(world, methods.orpo(beta=0.0)), gradient(world, methods.sft(), world.fresh().select(chosen)))


@pytest.mark.limit("kto")
def test_at_the_reference_kto_raises_what_is_desired_and_lowers_what_is_not() -> None:
    world = at_the_reference("feedback")
    world.batch.extras["mismatched_kl"] = zeros(world)
    padded = world.padded()
    weight = torch.where(padded.label > 0, 1.5, -0.5).double()
    known = -(weight * 0.3 / 4 * padded.sum(padded.logp)).mean()
    assert_equal(gradient(world, methods.kto(0.3, 1.5, 0.5)), of_loss(world, known))
