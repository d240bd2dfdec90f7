from __future__ import annotations

import math

import pytest
import torch
from flat_batches import ragged
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.objective.divergence import CriticLoss, EntropyBonus, FullKL, ReferenceKL
from posttrain.objective.likelihood import Likelihood


def test_reference_kl_by_hand() -> None:
    batch = ragged([[3]])
    batch.reference_logp = torch.tensor([-1.0, -2.0, -3.0])
    likelihood = Likelihood(torch.tensor([-1.0, -1.5, -4.0]))  # d = 0, -0.5, 1
    expected = {
        "k1": [0.0, 0.5, -1.0],
        "k2": [0.0, 0.125, 0.5],
        "k3": [0.0, math.exp(-0.5) - 0.5, math.e - 2],
    }
    for estimator, values in expected.items():
        found = ReferenceKL(1.0, estimator)(batch, likelihood)  # type: ignore[arg-type]
        torch.testing.assert_close(found, torch.tensor(values))


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000))
def test_k1_and_k3_are_unbiased_and_k2_has_the_right_gradient(seed: int) -> None:
    # over the whole vocabulary the expectation is exact, no sampling needed
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, generator=draw, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(6, generator=draw, dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    batch = ragged([[6]])
    batch.reference_logp = reference
    exact = (logp.exp() * (logp - reference)).sum()
    p = logp.detach().exp()
    for estimator in ("k1", "k3"):
        term = ReferenceKL(1.0, estimator)(batch, Likelihood(logp))
        torch.testing.assert_close((p * term).sum(), exact)
    (wanted,) = torch.autograd.grad(exact, logits, retain_graph=True)
    (found,) = torch.autograd.grad((p * ReferenceKL(1.0, "k2")(batch, Likelihood(logp))).sum(), logits)
    torch.testing.assert_close(found, wanted)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 1000), stale=st.booleans())
def test_the_correction_makes_the_gradient_unbiased(seed: int, stale: bool) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, generator=draw, dtype=torch.float64, requires_grad=True)
    reference, old = torch.randn(2, 6, generator=draw, dtype=torch.float64).log_softmax(-1)
    logp = logits.log_softmax(-1)
    batch = ragged([[6]])
    batch.reference_logp, batch.old_logp = reference, old if stale else None
    sampler = old.exp() if stale else logp.detach().exp()  # what the tokens were drawn from
    (wanted,) = torch.autograd.grad((logp.exp() * (logp - reference)).sum(), logits, retain_graph=True)
    for estimator in ("k1", "k3"):
        term = ReferenceKL(1.0, estimator, corrected=True)(batch, Likelihood(logp))
        (found,) = torch.autograd.grad((sampler * term).sum(), logits, retain_graph=True)
        torch.testing.assert_close(found, wanted)
        plain = ReferenceKL(1.0, estimator)(batch, Likelihood(logp))
        (biased,) = torch.autograd.grad((sampler * plain).sum(), logits, retain_graph=True)
        assert (biased - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_no_divergence_from_itself(estimator: str) -> None:
    batch = ragged([[3]])
    logp = torch.tensor([-1.0, -2.0, -3.0], requires_grad=True)
    batch.reference_logp = logp.detach().clone()
    term = ReferenceKL(1.0, estimator)(batch, Likelihood(logp))  # type: ignore[arg-type]
    assert bool((term == 0).all())
    (gradient,) = torch.autograd.grad(term.sum(), logp)
    assert gradient.tolist() == ([1.0, 1.0, 1.0] if estimator == "k1" else [0.0, 0.0, 0.0])


def test_critic_loss_by_hand() -> None:
    batch = ragged([[3]])
    batch.value = torch.tensor([0.0, 0.0, 0.0])
    batch.returns = torch.tensor([1.0, 1.0, -1.0])
    value = torch.tensor([0.1, 0.5, 0.5], requires_grad=True)
    found = CriticLoss(clip=0.2)(batch, Likelihood(torch.zeros(3), value=value))
    # inside the band; outside it towards the return (the clipped error is larger); outside it away from the return
    torch.testing.assert_close(found, torch.tensor([0.81, 0.64, 2.25]) / 2)
    (gradient,) = torch.autograd.grad(found.sum(), value)
    torch.testing.assert_close(gradient, torch.tensor([-0.9, 0.0, 1.5]))


def test_entropy_bonus_and_full_kl_hand_on_what_the_policy_found() -> None:
    batch = ragged([[2]])
    likelihood = Likelihood(torch.zeros(2), entropy=torch.tensor([1.0, 2.0]), divergence=torch.tensor([3.0, 4.0]))
    assert EntropyBonus()(batch, likelihood).tolist() == [-1.0, -2.0]
    assert FullKL()(batch, likelihood).tolist() == [3.0, 4.0]
    assert EntropyBonus().needs == {"entropy"}
    assert FullKL().needs == {"reference_hidden"}
    assert ReferenceKL().needs == {"reference_logp"}
    assert CriticLoss().needs == {"value"}
