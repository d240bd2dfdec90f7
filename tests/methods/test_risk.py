"""RiskPO: the paper's loss written out, and limits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from padded_world import Padded, World, float64  # noqa: F401 (a fixture)
from torch import Tensor

from posttrain import methods
from posttrain.objective.aggregate import TokenMean
from posttrain.objective.risk import LEVELS, MixedValueAtRisk
from posttrain.training.method import Method


def gradient(world: World, loss: Tensor) -> list[Tensor]:
    parameters = list(world.policy.parameters.values())
    return list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))


def of_method(world: World, method: Method) -> tuple[Tensor, list[Tensor]]:
    """The method's loss and gradient on the world's batch."""
    batch = world.fresh()
    method.objective.prepare(batch)
    loss = method.objective(batch, world.policy.log_likelihood(batch), batch.totals)
    return loss.value, gradient(world, loss.surrogate)


def assert_equal(found: list[Tensor], wanted: list[Tensor], factor: float = 1.0) -> None:
    assert max(float(g.abs().max()) for g in wanted) > 1e-6  # or nothing was compared
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, factor * theirs, rtol=1e-9, atol=1e-11)


# -- the paper's loss ------------------------------------------------------------------------------------------------


def paper_advantages(w: Padded, quantile: dict[str, float] | None, **a: Any) -> Tensor:
    """From the equations, one paper after another. quantile: q at alpha and beta; None for those of each bundle."""
    advantage = torch.zeros_like(w.reward)
    bundles = [w.groups[i : i + a["bundle"]] for i in range(0, len(w.groups), a["bundle"])]
    for bundle in bundles:
        papers = min(len(g) for g in bundle)
        scores = [sum(float(w.reward[g[j]]) for g in bundle) for j in range(papers)]
        if quantile is None or len(bundle) < a["bundle"]:
            low, high = (float(np.quantile(scores, a[k])) for k in ("alpha", "beta"))
        else:
            low, high = quantile["alpha"], quantile["beta"]
        spread = float(np.std(scores, ddof=1)) if papers > 1 else 1.0
        for j, s in enumerate(scores):
            c = low - high if a["natural_baseline"] else 0.0
            middle = (max(s - low, 0) - max(s - high, 0) + c) / (a["beta"] - a["alpha"])
            tail = -max(low - s, 0) / a["alpha"]
            if a["tail"] == "upper":
                tail = max(s - high, 0) / (1 - a["beta"])
            whole = (a["weight"] * tail + middle) / (a["weight"] + 1) / ((spread if spread > 1e-3 else 1.0) + 1e-6)
            over = [float(w.reward[g[j]] - w.reward[g].mean()) for g in bundle]
            for g, own in zip(bundle, over, strict=True):
                sigma = float(np.std(w.reward[g].numpy(), ddof=1))
                shares = {
                    "uniform": 1.0,
                    "std": 1 / (sigma if sigma > 1e-3 else 1.0),
                    "score": 0.5 if w.reward[g[j]] > 0 else 1.5,
                    "sum-mean": min(5.0, max(-5.0, own / sum(over))) if abs(sum(over)) > 1e-6 else 1 / len(bundle),
                }
                advantage[g[j]] = whole * shares[a["sharing"]]
    return advantage


def paper_loss(w: Padded, advantage: Tensor, clip: float = 0.2) -> Tensor:
    ratio, each = (w.logp - w.old).exp(), advantage[:, None]
    clipped = torch.min(ratio * each, ratio.clamp(1 - clip, 1 + clip) * each)
    return -(clipped * w.mask).sum() / w.mask.sum()


DEFAULTS = {"alpha": 0.2, "beta": 0.8, "weight": 1.5, "bundle": 2, "natural_baseline": False, "tail": "lower"}
CASES: list[dict[str, Any]] = [
    {"sharing": "sum-mean"},
    {"sharing": "uniform", "beta": 0.9, "natural_baseline": True},
    {"sharing": "std", "alpha": 0.3, "weight": 0.5},
    {"sharing": "score", "bundle": 3},
    {"sharing": "uniform", "tail": "upper"},
]


@pytest.mark.gradient("riskpo")
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("mode", ["track", "batch"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_and_gradient_equal_the_papers(case: dict[str, Any], mode: Any, seed: int) -> None:
    arguments = {**DEFAULTS, **case}
    world = World("prompts", seed)
    w = world.padded()
    made = methods.riskpo(**arguments, mode=mode)
    tracked = {"alpha": 0.4, "beta": 1.1}
    part = made.objective.advantage
    assert isinstance(part, MixedValueAtRisk)
    part.tracked = [tracked["alpha"] if level < 0.5 else tracked["beta"] for level in LEVELS]
    advantage = paper_advantages(w, tracked if mode == "track" else None, **arguments)
    expected = paper_loss(w, advantage)
    value, found = of_method(world, made)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=1e-9)
    assert_equal(found, gradient(world, expected))


@pytest.mark.limit("riskpo")
def test_without_tails_it_is_the_mean_reward_over_a_baseline() -> None:
    # card 030 (b), on bundles of one prompt: A = (R - q) / sd, which is GRPO's with another baseline
    world = World("prompts")
    part = methods.riskpo(1e-9, 1 - 1e-9, weight=0.0, bundle=1, sharing="uniform", mode="track")
    advantage = part.objective.advantage
    assert isinstance(advantage, MixedValueAtRisk)
    advantage.tracked = [0.0 if level < 0.5 else 2.0 for level in LEVELS]
    batch = world.fresh()
    advantage.prepare(batch)
    found = batch.advantage
    for rows in world.padded().groups:
        reward = world.batch.reward[rows]
        sigma = float(reward.std()) if float(reward.std()) > 1e-3 else 1.0
        for row in rows:
            wanted = float(world.batch.reward[row]) / (sigma + 1e-6)
            own = found[batch.sequence == row]
            torch.testing.assert_close(own, torch.full_like(own, wanted), rtol=1e-6, atol=1e-7)


@pytest.mark.limit("riskpo")
def test_with_its_advantages_given_it_is_grpo_with_a_mean_over_tokens() -> None:
    world = World("prompts")
    mine = methods.riskpo(bundle=2).replace(advantage=methods.grpo().objective.advantage)
    assert_equal(of_method(world, mine)[1], of_method(world, methods.grpo().replace(aggregate=TokenMean()))[1])


def test_the_batch_is_two_bundles() -> None:
    assert methods.riskpo().settings.batch == 10
    assert methods.riskpo(bundle=4).settings.batch == 8
