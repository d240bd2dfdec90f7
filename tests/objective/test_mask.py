from __future__ import annotations

import math

import torch
from flat_batches import ragged
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from posttrain.objective.denominator import OldPolicySequence, Ratio
from posttrain.objective.mask import Clip, DropTruncated, DualClip, Plausible
from posttrain.trajectory import SOURCES


def at(*ratios: float) -> Ratio:
    log_ratio = torch.tensor(ratios, dtype=torch.float64).log()
    return Ratio(log_ratio.exp(), log_ratio.exp(), log_ratio)


def test_clip_by_hand() -> None:
    # card 181 (b): 1.3 with a positive advantage is masked, with a negative one kept; 0.75 the other way round
    batch = ragged([[6]])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0])
    kept = Clip(0.2, 0.27)(batch, at(1.3, 1.3, 0.75, 0.75, 1.26, 0.81), advantage)
    assert kept.keep.tolist() == [False, True, True, False, True, True]
    assert kept.bound[0].item() == 1.27
    assert kept.bound[3].item() == 0.8


def test_clip_keeps_tokens_without_advantage_and_on_the_boundary() -> None:
    batch = ragged([[3]])
    kept = Clip(0.5, 0.5)(batch, at(9.0, 1.5, 0.5), torch.tensor([0.0, 1.0, -1.0]))
    assert kept.keep.tolist() == [True, True, True]


@settings(deadline=None, max_examples=100)
@given(
    ratio=st.floats(0.05, 20),
    advantage=st.floats(-3, 3).filter(lambda a: a == 0 or abs(a) > 1e-3),
    low=st.floats(0.01, 0.9),
    high=st.floats(0.01, 2),
)
def test_clip_is_the_minimum_of_ppo(ratio: float, advantage: float, low: float, high: float) -> None:
    log_ratio = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    rho, a = log_ratio.exp(), torch.tensor([advantage], dtype=torch.float64)
    objective = torch.min(rho * a, rho.clamp(1 - low, 1 + high) * a)
    (gradient,) = torch.autograd.grad(objective.sum(), log_ratio)
    kept = Clip(low, high)(ragged([[1]]), Ratio(rho.detach(), rho.detach(), log_ratio.detach()), a)
    factor = torch.where(kept.keep, rho.detach(), kept.bound)
    torch.testing.assert_close(factor * a, objective.detach())
    torch.testing.assert_close(torch.where(kept.keep, rho.detach() * a, 0.0), gradient)


@settings(deadline=None, max_examples=100)
@given(ratio=st.floats(0.05, 20), advantage=st.sampled_from([-2.0, -0.5, 0.0, 0.5, 2.0]), delta=st.floats(1.3, 10))
def test_dual_clip_bounds_the_loss_of_bad_tokens(ratio: float, advantage: float, delta: float) -> None:
    # max(min(rho A, clip(rho) A), delta A) for A < 0, as the paper writes it
    log_ratio = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    rho, a = log_ratio.exp(), torch.tensor([advantage], dtype=torch.float64)
    objective = torch.min(rho * a, rho.clamp(0.8, 1.2) * a)
    if advantage < 0:
        assume(rho.item() != delta)  # the kink, where autograd takes the half of both sides
        objective = torch.max(objective, delta * a)
    (gradient,) = torch.autograd.grad(objective.sum(), log_ratio)
    given_ratio = Ratio(rho.detach(), rho.detach(), log_ratio.detach())
    factor, keep = rho.detach(), torch.ones(1, dtype=torch.bool)
    for mask in (Clip(0.2, 0.2), DualClip(delta)):
        kept = mask(ragged([[1]]), given_ratio, a)
        factor, keep = torch.where(kept.keep, factor, kept.bound), keep & kept.keep
    torch.testing.assert_close(factor * a, objective.detach())
    torch.testing.assert_close(torch.where(keep, rho.detach() * a, 0.0), gradient)


def test_dual_clip_by_hand() -> None:
    kept = DualClip(3.0)(ragged([[4]]), at(4.0, 4.0, 2.9, 0.1), torch.tensor([-1.0, 1.0, -1.0, -1.0]))
    assert kept.keep.tolist() == [False, True, True, True]
    assert kept.bound[0].item() == 3.0


def test_clip_masks_whole_sequences_on_sequence_ratios() -> None:
    batch = ragged([[3, 2]])
    batch.old_logp = torch.zeros(5)
    # single tokens leave the band, the mean of the first sequence does not
    logp = torch.tensor([0.9, -0.9, 0.03, 0.5, 0.1])
    kept = Clip(0.2, 0.2)(batch, OldPolicySequence()(batch, logp), torch.ones(5))
    assert kept.keep.tolist() == [True, True, True, False, False]


def test_truncated_sequences_are_dropped_whole() -> None:
    batch = ragged([[2, 1], [3]])
    batch.truncated = torch.tensor([False, True, True])
    kept = DropTruncated()(batch, at(1.0, 1.0, 1.0, 1.0, 1.0, 1.0), torch.ones(6))
    assert kept.keep.tolist() == [True, True, False, False, False, False]
    assert bool((kept.bound == 0).all())


def test_implausible_tokens_of_others_are_dropped() -> None:
    batch = ragged([[4]])
    assert batch.token_source is not None
    batch.token_source[2:] = SOURCES.index("replay")
    ratio = at(1, 1, 1, 1)
    ratio.logp = torch.tensor([-20.0, -1.0, -13.9, -13.8])  # log 1e-6 = -13.8155
    kept = Plausible(1e-6)(batch, ratio, -torch.ones(4))
    assert kept.keep.tolist() == [True, True, False, True]
    assert kept.bound.tolist() == [0, 0, 0, 0]
