"""Sharpness in the logits: numbers by hand, the maximum against a search, and which tokens it looks at."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from posttrain.evaluation.sharpness import EPSILON, logit_sharpness, sharpness
from posttrain.objective.batch import Batch
from posttrain.trajectory import PosttrainError
from tiny_models import make_policy, ragged_groups


def test_two_tokens_that_are_alike() -> None:
    """V = 2 and z = 0: f = ln 2, and S = 100 (ln(1 + e^2ε) - ln 2) / (1 + ln 2)."""
    for epsilon in (5e-4, 0.1, 1.0):
        found = logit_sharpness(torch.zeros(2), torch.tensor(0), epsilon)
        expected = 100 * (math.log1p(math.exp(2 * epsilon)) - math.log(2)) / (1 + math.log(2))
        assert float(found) == pytest.approx(expected, rel=1e-9)


def test_no_room_no_sharpness() -> None:
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(logit_sharpness(logits, torch.arange(4), 0.0), torch.zeros(4, dtype=torch.float64))


def test_the_corner_is_where_a_search_ends() -> None:
    """L-BFGS-B over the box, from inside it, finds nothing above."""
    from scipy.optimize import minimize

    draw, epsilon = np.random.default_rng(0), 0.05
    for _ in range(5):
        z, y = draw.normal(size=7) * 3, int(draw.integers(7))

        def loss(d: np.ndarray, z: np.ndarray = z, y: int = y) -> float:
            moved = z + d
            return float(np.log(np.exp(moved).sum()) - moved[y])

        reach = epsilon * (np.abs(z) + 1)
        found = minimize(
            lambda d: -loss(d), np.zeros(7), bounds=list(zip(-reach, reach, strict=True)), method="L-BFGS-B"
        )
        best = 100 * (-found.fun - loss(np.zeros(7))) / (1 + loss(np.zeros(7)))
        mine = float(logit_sharpness(torch.tensor(z), torch.tensor(y), epsilon))
        assert mine == pytest.approx(best, rel=1e-5)


def test_nothing_in_the_box_is_higher() -> None:
    draw = torch.Generator().manual_seed(0)
    z, epsilon = torch.randn(11, generator=draw).double(), 0.1
    y = torch.tensor(3)
    most = float(logit_sharpness(z, y, epsilon))
    before = torch.nn.functional.cross_entropy(z, y)
    for _ in range(200):
        d = epsilon * (z.abs() + 1) * (2 * torch.rand(11, generator=draw).double() - 1)
        after = torch.nn.functional.cross_entropy(z + d, y)
        assert 100 * float((after - before) / (1 + before)) <= most


@pytest.mark.parametrize("name", ["llama", "mamba"])
def test_of_a_model_it_is_that_of_each_sequences_last_token(name: str) -> None:
    policy, groups = make_policy(name, None), ragged_groups()
    expected = []
    for group in groups:
        for row in group.trajectories:
            place = int(row.action_mask.nonzero()[-1])
            with torch.no_grad():
                logits = policy.model(row.tokens[None]).logits[0, place - 1]
            expected.append(float(logit_sharpness(logits, row.tokens[place])))
    assert sharpness(policy, groups) == pytest.approx(float(np.mean(expected)), rel=1e-4)
    assert sharpness(policy, groups) > 0
    assert len(expected) == len(Batch.of(groups))


def test_a_confident_model_is_sharper_in_what_it_gets_wrong() -> None:
    z = torch.tensor([4.0, 0.0, 0.0])
    right, wrong = (float(logit_sharpness(z, torch.tensor(y), EPSILON)) for y in (0, 1))
    assert wrong > right
    with pytest.raises(PosttrainError, match="epsilon is -1"):
        logit_sharpness(z, torch.tensor(0), -1)
    with pytest.raises(PosttrainError, match="no window to predict"):
        sharpness(make_policy("llama", None), [])
