from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from flat_batches import pairs, ragged, sequence
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posttrain.objective.batch import Batch
from posttrain.objective.pairs import (
    IPO,
    KTO,
    APODown,
    APOZero,
    Hinge,
    LengthNormalised,
    OddsRatio,
    Pair,
    PairLoss,
    Preference,
    Robust,
    Sigmoid,
    SimPO,
)
from posttrain.trajectory import Group


def pair(
    chosen: float, rejected: float, base_c: float = 0.0, base_r: float = 0.0, lengths: tuple[int, int] = (1, 1)
) -> Pair:
    scores = [torch.tensor([x], dtype=torch.float64) for x in (chosen, rejected, base_c, base_r, *lengths)]
    return Pair(*scores)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# log-ratios 2 and -2 (margin 4) over 5 and 20 tokens: means 0.4 and -0.1, scores per token -2 and -1.5
CARD = pair(-10, -30, -12, -28, (5, 20))


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (Sigmoid(0.1), -math.log(sigmoid(0.4))),
        (Sigmoid(0.1, 0.2), -0.8 * math.log(sigmoid(0.4)) - 0.2 * math.log(sigmoid(-0.4))),
        (Robust(0.1, 0.2), (-0.8 * math.log(sigmoid(0.4)) + 0.2 * math.log(sigmoid(-0.4))) / 0.6),
        (Hinge(0.1), 0.6),
        (Hinge(1.0), 0.0),
        (IPO(0.1), (0.5 - 5) ** 2),
        (LengthNormalised(5.0), 0.0788897),  # card 044: margin 2.5
        (SimPO(2.0, 0.5), -math.log(sigmoid(2 * (-2 + 1.5) - 0.5))),
        (SimPO(2.0, 0.5, 0.1), -0.9 * math.log(sigmoid(-1.5)) - 0.1 * math.log(sigmoid(1.5))),
        (APOZero(0.1), 1 - sigmoid(0.2) + sigmoid(-0.2)),
        (APODown(0.1), sigmoid(0.2) + 1 - sigmoid(0.4)),
        (
            OddsRatio(0.3),
            2 - 0.3 * math.log(sigmoid((-2 - math.log(1 - math.exp(-2))) - (-1.5 - math.log(1 - math.exp(-1.5))))),
        ),
    ],
    ids=lambda v: repr(v) if not isinstance(v, float) else "",
)
def test_losses_by_hand(loss: PairLoss, expected: float) -> None:
    assert loss(CARD).item() == pytest.approx(expected, abs=1e-7)


def test_odds_ratio_is_the_ratio_of_odds() -> None:
    # mean probabilities 1/2 and 1/4: odds 1 and 1/3, so the sigmoid of log 3 is 3/4
    found = OddsRatio(1.0)(pair(math.log(0.5), math.log(0.25)))
    assert found.item() == pytest.approx(math.log(2) - math.log(0.75), abs=1e-9)


@pytest.mark.parametrize("score", [0.0, -1e-12, -1e-7, -0.6931, -50.0, -1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_odds_ratio_is_finite_with_its_gradient_for_certain_answers(score: float, dtype: torch.dtype) -> None:
    chosen = torch.tensor([score], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-1.0], dtype=dtype)
    one, none = torch.ones_like(rejected), torch.zeros_like(rejected)
    loss = OddsRatio(0.1)(Pair(chosen, rejected, none, none, one, one))
    loss.sum().backward()
    assert bool(loss.isfinite().all())
    assert chosen.grad is not None
    assert bool(chosen.grad.isfinite().all())


@settings(deadline=None, max_examples=50)
@given(
    scores=st.lists(st.floats(-20, -0.1), min_size=4, max_size=4), length=st.integers(1, 30), beta=st.floats(0.05, 5)
)
def test_known_limits(scores: list[float], length: int, beta: float) -> None:
    chosen, rejected, base_c, base_r = scores
    same = pair(chosen, rejected, base_c, base_r, (length, length))

    def equal(one: PairLoss, other: PairLoss, at: Pair = same) -> None:
        torch.testing.assert_close(one(at), other(at), rtol=1e-9, atol=1e-9)

    # card 044: at equal lengths the length-normalised loss is DPO with beta / length
    equal(LengthNormalised(beta), Sigmoid(beta / length))
    equal(Sigmoid(beta), Robust(beta, 0.0))
    equal(SimPO(beta, 0.0), LengthNormalised(beta), pair(chosen, rejected, lengths=(3, 7)))
    half = Sigmoid(beta, 0.5)
    swapped = pair(rejected, chosen, base_r, base_c)
    torch.testing.assert_close(half(same), half(swapped))  # labels that are coin flips do not matter
    # the robust loss is unbiased: over flips with probability e it averages to DPO's
    robust = Robust(beta, 0.2)
    torch.testing.assert_close(0.8 * robust(same) + 0.2 * robust(swapped), Sigmoid(beta)(same))


LOSSES: list[tuple[PairLoss, bool]] = [
    (Sigmoid(0.3), True),
    (Sigmoid(0.3, 0.1), True),
    (Robust(0.3, 0.1), True),
    (Hinge(0.3), True),
    (IPO(0.3), True),
    (LengthNormalised(2.0), True),
    (APOZero(0.3), True),
    (APODown(0.3), True),
    (SimPO(), False),
    (OddsRatio(0.2), False),
]


def with_logp(batch: Batch, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    batch.reference_logp = -2 * torch.rand(batch.target.numel(), generator=draw, dtype=torch.float64) - 0.1
    return -2 * torch.rand(batch.target.numel(), generator=draw, dtype=torch.float64) - 0.1


@pytest.mark.parametrize(("loss", "reference"), LOSSES, ids=lambda v: repr(v))
def test_credit_is_minus_the_derivative_of_the_loss(loss: PairLoss, reference: bool) -> None:
    batch = pairs([(3, 2), (1, 4), (2, 2)], flip=[1])
    logp = with_logp(batch).requires_grad_()
    advantage = Preference(loss, reference)
    advantage.prepare(batch)
    credit = advantage.credit(batch, logp)
    assert batch.reference_logp is not None
    total = torch.zeros((), dtype=torch.float64)
    for g in range(3):
        picked = {}
        for label in (1, -1):
            (s,) = ((batch.group == g) & (batch.label == label)).nonzero()[:, 0].tolist()
            own = batch.sequence == s
            base = batch.reference_logp[own].sum() if reference else torch.zeros((), dtype=torch.float64)
            picked[label] = logp[own].sum(), base, own.sum().double()
        (c, bc, nc), (r, br, nr) = picked[1], picked[-1]
        each = loss(Pair(*(x[None] for x in (c, r, bc, br, nc, nr))))
        assert credit.value is not None
        chosen = ((batch.group == g) & (batch.label > 0)).nonzero()[0]
        torch.testing.assert_close(credit.value[chosen], each.detach())
        total = total + each.sum()
    assert credit.value is not None
    torch.testing.assert_close(credit.value.sum(), total.detach())
    (gradient,) = torch.autograd.grad(total, logp)
    torch.testing.assert_close(credit.advantage, -gradient)
    assert not credit.advantage.requires_grad
    assert advantage.needs == ({"reference_logp"} if reference else set())


def test_credit_works_inside_no_grad_and_reports_the_margin() -> None:
    batch = pairs([(1, 1), (1, 1)])
    batch.reference_logp = torch.zeros(4)
    with torch.no_grad():
        credit = Preference(Sigmoid(1.0)).credit(batch, torch.tensor([-1.0, -3.0, -4.0, -1.0]))
    assert credit.metrics is not None
    assert credit.metrics["margin"].tolist() == [2.0, -3.0]
    assert credit.metrics["accuracy"].tolist() == [1.0, 0.0]
    # chosen goes up by beta sigma(-beta m), rejected down by as much
    torch.testing.assert_close(credit.advantage[:2], torch.tensor([1.0, -1.0]) * sigmoid(-2.0))


@pytest.mark.parametrize(
    "labels",
    [[("chosen",)], [("chosen", "chosen")], [("chosen", "rejected", "rejected")], [("chosen", "rejected"), ("none",)],
     [("chosen", "rejected") * 2]],
)  # fmt: skip
def test_incomplete_pairs_are_refused(labels: list[tuple[str, ...]]) -> None:
    batch = Batch.of([Group([sequence(2, label=label) for label in group]) for group in labels])
    with pytest.raises(ValueError, match="one chosen and one rejected sequence in every group"):
        Preference(Sigmoid()).prepare(batch)


# -- KTO -------------------------------------------------------------------------------------------------------------


def feedback(z: float) -> Batch:
    """Two desirable answers and an undesirable one; `z` is the mean log-ratio of mismatched answers."""
    batch = ragged([[2], [1], [3]])
    batch.label = torch.tensor([1, 1, -1])
    batch.extras["mismatched_kl"] = torch.full((6,), z, dtype=torch.float64)
    return batch


@pytest.mark.parametrize("z", [0.7, -0.7])
def test_kto_by_hand(z: float) -> None:
    batch = feedback(z)
    batch.reference_logp = torch.tensor([-1.0, -1.0, -2.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    logp = torch.tensor([-0.5, -1.0, -3.0, -1.0, -0.5, -1.5], dtype=torch.float64)  # log-ratios 0.5, -1, 0
    anchor = max(z, 0.0)
    expected = [2 * (1 - sigmoid(0.4 * (r - anchor))) for r in (0.5, -1.0)]
    expected.append(3 * (1 - sigmoid(0.4 * anchor)))
    credit = KTO(0.4, desirable=2.0, undesirable=3.0).credit(batch, logp)
    assert credit.value is not None
    torch.testing.assert_close(credit.value, torch.tensor(expected, dtype=torch.float64))
    assert credit.metrics is not None
    assert credit.metrics["accuracy"].tolist() == [float(anchor < 0.5), 0.0, 1.0]


def test_kto_credit_is_minus_the_derivative_with_the_anchor_held() -> None:
    batch = feedback(0.3)
    logp = with_logp(batch).requires_grad_()
    credit = KTO(0.4, 1.5, 0.5).credit(batch, logp)
    assert batch.reference_logp is not None
    ratio = batch.sum(logp - batch.reference_logp)
    loss = 1.5 * (1 - F.sigmoid(0.4 * (ratio[:2] - 0.3))).sum() + 0.5 * (1 - F.sigmoid(0.4 * (0.3 - ratio[2])))
    (gradient,) = torch.autograd.grad(loss, logp)
    torch.testing.assert_close(credit.advantage, -gradient)


def test_kto_needs_labels() -> None:
    batch = feedback(0.0)
    batch.label[1] = 0
    with pytest.raises(ValueError, match="labelled desirable"):
        KTO().prepare(batch)
    assert KTO().needs == {"reference_logp", "mismatched_kl"}
    assert not KTO().keep_groups


def test_every_pair_loss_has_a_case() -> None:
    from posttrain.objective import pairs as module

    named = {
        value
        for value in vars(module).values()
        if isinstance(value, type) and "__call__" in vars(value) and value.__module__ == module.__name__
    }
    assert named == {type(loss) for loss, _ in LOSSES}
