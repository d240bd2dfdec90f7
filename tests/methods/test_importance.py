"""MinPRO and MiniRL: the papers' losses written out, and limits in which they equal methods that are known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
from padded_world import Padded, World, float64  # noqa: F401 (a fixture)
from torch import Tensor

from posttrain import methods
from posttrain.objective.aggregate import TokenMean
from posttrain.objective.denominator import OldPolicy
from posttrain.objective.mask import Clip
from posttrain.objective.prefix_ratio import PrefixGeometricMean, PrefixProduct
from posttrain.training.method import Method
from posttrain.trajectory import PosttrainError

NAMES = ("minpro", "minirl")


@dataclass
class Sampled(Padded):
    """With what the engine said: `[S, T]` log-probabilities."""

    sampler: Tensor = field(default_factory=lambda: torch.empty(0))


def world_of(seed: int = 0) -> tuple[World, Sampled]:
    """A batch whose engine computed other probabilities than the trainer, and its padded view."""
    world = World("prompts", seed)
    batch = world.batch
    noise = torch.randn(batch.target.numel(), generator=torch.Generator().manual_seed(seed + 50), dtype=torch.float64)
    assert batch.old_logp is not None
    batch.behaviour_logp_full = batch.old_logp + 0.8 * noise
    seen = world.padded()
    sampler = torch.zeros_like(seen.mask)
    sampler[batch.sequence, batch.place] = batch.behaviour_logp_full
    return world, Sampled(**vars(seen), sampler=sampler)


def of_method(world: World, method: Method) -> tuple[Tensor, list[Tensor], dict[str, tuple[float, float]]]:
    batch = world.fresh()
    method.objective.prepare(batch)
    loss = method.objective(batch, world.policy.log_likelihood(batch), batch.totals)
    return loss.value, gradient(world, loss.surrogate), loss.metrics


def gradient(world: World, loss: Tensor) -> list[Tensor]:
    parameters = list(world.policy.parameters.values())
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def assert_equal(found: list[Tensor], wanted: list[Tensor], factor: float = 1.0) -> None:
    assert max(float(g.abs().max()) for g in wanted) > 1e-6  # or nothing was compared
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, factor * theirs, rtol=1e-9, atol=1e-11)


# -- the papers ------------------------------------------------------------------------------------------------------


def advantages(w: Padded, *, scaled: bool) -> Tensor:
    found = torch.empty_like(w.reward)
    for rows in w.groups:
        own = w.reward[rows]
        found[rows] = (own - own.mean()) / ((own.std() + 1e-4) if scaled else 1.0)
    return found


def prefix_weights(w: Padded, of: Callable[[list[float], int], float]) -> Tensor:
    """`[S, T]` ratios from the token ratios of each row up to each token, one token after another."""
    found = torch.ones_like(w.old)
    for s in range(len(w.reward)):
        places = w.mask[s].nonzero()[:, 0].tolist()
        ratios = [float((w.logp[s, t] - w.old[s, t]).detach().exp()) for t in places]
        for i, t in enumerate(places):
            found[s, t] = of(ratios, i)
    return found


def product(ratios: list[float], i: int) -> float:
    result = 1.0
    for r in ratios[: i + 1]:
        result *= r
    return result


def minimum(ratios: list[float], i: int, cap: bool = False, floor: float = 0.0) -> float:
    before = min(ratios[:i]) if i else 1.0
    before = min(before, 1.0) if cap else before
    return ratios[i] * max(before, floor)


def minpro_weight(of: Callable[[list[float], int], float], high: float) -> Callable[[Sampled], Tensor]:
    def paper(w: Sampled) -> Tensor:
        weight = prefix_weights(w, of).clamp(max=1 + high)
        each = weight * advantages(w, scaled=True)[:, None] * w.logp
        return -(each * w.mask).sum() / w.mask.sum()

    return paper


def minpro_clip(low: float, high: float) -> Callable[[Sampled], Tensor]:
    def paper(w: Sampled) -> Tensor:
        smallest = prefix_weights(w, lambda ratios, i: min(ratios[:i]) if i else 1.0)
        ratio = smallest * (w.logp - w.old).exp()  # the gradient flows through the token's own ratio alone
        advantage = advantages(w, scaled=True)[:, None]
        each = torch.min(ratio * advantage, ratio.clamp(1 - low, 1 + high) * advantage)
        return -(each * w.mask).sum() / w.mask.sum()

    return paper


def minirl(low: float, high: float, bound: float) -> Callable[[Sampled], Tensor]:
    def paper(w: Sampled) -> Tensor:
        advantage = advantages(w, scaled=False)[:, None]
        stale = (w.logp - w.old).detach().exp()
        masked = ((advantage > 0) & (stale > 1 + high)) | ((advantage < 0) & (stale < 1 - low))
        weight = torch.min((w.logp - w.sampler).detach().exp(), torch.tensor(bound))
        each = torch.where(masked, 0.0, weight * advantage * w.logp)
        return -w.sum(each).mean()  # tokens summed, responses averaged

    return paper


@dataclass(frozen=True)
class Case:
    name: str
    method: Method
    paper: Callable[[Sampled], Tensor]

    def __str__(self) -> str:
        return self.name


CASES = [
    Case("minpro", methods.minpro(), minpro_weight(minimum, 0.28)),
    Case("minpro-capped", methods.minpro(cap_one=True), minpro_weight(lambda r, i: minimum(r, i, cap=True), 0.28)),
    Case("minpro-floor", methods.minpro(0.1, floor=0.8), minpro_weight(lambda r, i: minimum(r, i, floor=0.8), 0.1)),
    Case("minpro-clip", methods.minpro(form="clip"), minpro_clip(0.2, 0.28)),
    Case("minpro-clip-wide", methods.minpro(0.5, 0.4, form="clip"), minpro_clip(0.4, 0.5)),
    Case("minpro-product", methods.minpro(prefix="product"), minpro_weight(product, 0.28)),
    Case(
        "minpro-geometric",
        methods.minpro(prefix="geometric"),
        minpro_weight(lambda r, i: product(r, i) ** (1 / (i + 1)), 0.28),
    ),
    Case("minirl", methods.minirl(), minirl(0.2, 0.27, 5.0)),
    Case("minirl-tight", methods.minirl(0.05, 0.1, 1.2), minirl(0.05, 0.1, 1.2)),
]


@pytest.mark.gradient(*NAMES)
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradient_equal_the_papers(case: Case, seed: int) -> None:
    world, w = world_of(seed)
    expected = case.paper(w)
    value, found, metrics = of_method(world, case.method)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=1e-9)
    assert_equal(found, gradient(world, expected))
    if case.method.objective.masks:
        masked, tokens = metrics["clip_fraction"]
        assert 0 < masked < tokens


# -- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.limit("minpro")
@pytest.mark.parametrize("form", ["weight", "clip"])
def test_before_any_update_minpro_is_grpo_with_a_mean_over_tokens(form: str) -> None:
    world, _ = world_of()
    world.batch.old_logp = None
    plain = methods.grpo().replace(aggregate=TokenMean())
    assert_equal(of_method(world, methods.minpro(form=form))[1], of_method(world, plain)[1])


@pytest.mark.limit("minpro")
def test_where_no_ratio_falls_below_one_a_capped_minimum_is_the_token_ratio() -> None:
    world, _ = world_of()
    now = world.policy.log_likelihood(world.batch).logp.detach()
    assert world.batch.old_logp is not None
    world.batch.old_logp = torch.minimum(world.batch.old_logp, now)
    assert float((now - world.batch.old_logp).max()) > 0.28
    capped = of_method(world, methods.minpro(cap_one=True))
    cispo = of_method(world, methods.cispo(high=1.28))
    assert_equal(capped[1], cispo[1])
    torch.testing.assert_close(capped[0], cispo[0])
    clipped = of_method(world, methods.minpro(form="clip", cap_one=True))
    dapo = methods.grpo().replace(masks=(Clip(0.2, 0.28),), aggregate=TokenMean())
    assert_equal(clipped[1], of_method(world, dapo)[1])
    assert isinstance(dapo.objective.denominator, OldPolicy)


@pytest.mark.limit("minirl")
def test_a_on_policy_with_an_exact_engine_minirl_is_reinforce_and_dr_grpo() -> None:
    world, _ = world_of()
    now = world.policy.log_likelihood(world.batch).logp.detach()
    world.batch.old_logp = world.batch.behaviour_logp_full = now
    _, found, _ = of_method(world, methods.minirl())
    tokens = world.batch.target.numel()
    reinforce = of_method(world, methods.reinforce("group"))[1]  # a mean over tokens, of which there are these
    assert_equal(found, reinforce, tokens / len(world.batch))
    assert_equal(found, of_method(world, methods.dr_grpo(length=7))[1], 7.0)


@pytest.mark.limit("minirl")
def test_with_an_exact_engine_and_no_band_minirl_is_cispo_summed_without_scaling() -> None:
    world, _ = world_of()
    assert world.batch.old_logp is not None
    world.batch.behaviour_logp_full = world.batch.old_logp
    mine = methods.minirl(low=1.0, high=1e9, bound=1.5)
    other = methods.cispo(1.5).replace(
        advantage=mine.objective.advantage,
        aggregate=mine.objective.aggregate,
    )
    assert_equal(of_method(world, mine)[1], of_method(world, other)[1])


def test_the_engines_own_share_of_the_divergence_is_reported() -> None:
    world, w = world_of()
    metrics = of_method(world, methods.minirl())[2]
    total, count = metrics["engine_kl"]
    assert total / count == pytest.approx(float(((w.sampler - w.old) * w.mask).sum() / w.mask.sum()))
    total, count = metrics["sampler_kl"]
    assert total / count == pytest.approx(float(((w.sampler - w.logp.detach()) * w.mask).sum() / w.mask.sum()))


# -- choices ---------------------------------------------------------------------------------------------------------


def test_choices() -> None:
    assert methods.minpro().settings.minibatches == 8
    assert isinstance(methods.minpro(prefix="product").objective.denominator, PrefixProduct)
    assert isinstance(methods.minpro(prefix="geometric").objective.denominator, PrefixGeometricMean)
    assert [methods.minirl(routing=r).replay_experts for r in ("none", "trainer", "sampler")] == [
        None,
        "trainer",
        "sampler",
    ]
    for wrong in ({"prefix": "mean"}, {"form": "ppo"}):
        with pytest.raises(PosttrainError, match="expected"):
            methods.minpro(**wrong)
    with pytest.raises(PosttrainError, match="expected none, trainer or sampler"):
        methods.minirl(routing="r3")
