"""Rollouts of an older policy: what the ratios of a prefix are worth, exactly and in training."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from posttrain import methods
from posttrain.evaluation.task import Task
from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.objective.denominator import ClippedWeight, Denominator, OldPolicy, OldPolicySequence
from posttrain.objective.prefix_ratio import PrefixGeometricMean, PrefixMinimum, PrefixProduct
from posttrain.studies.arms import in_lab, trained
from posttrain.studies.registry import study
from posttrain.studies.study import Arm, Measured, Study
from posttrain.studies.verdict import AtLeast, Better, Lower
from posttrain.training.method import Method
from posttrain.trajectory import Group, Trajectory

# -- the exact estimator ---------------------------------------------------------------------------------------------

SYMBOLS, LENGTH = 3, 6
DRIFTS = (0.25, 0.5, 1.0, 1.5)  # standard deviation of what the policy's logits have moved by


def enumerated(seed: int, quick: bool, *, denominator: Denominator, tables: int) -> Measured:
    """The gradient that a denominator gives in expectation, against the true one, over all 729 sequences.

    A policy is a table of logits by place and the symbol before; the old one is another table, `drift` away. Credit is
    the policy's own action value, so that the product of the prefix's ratios is exact. Figures at the largest drift:
    `cosine` and relative `error` of the expected gradient, and `noise`, the standard deviation of one sequence's
    gradient over the true gradient's norm; means over `tables` random tables.
    """
    found = {drift: torch.zeros(3, dtype=torch.float64) for drift in DRIFTS}
    count = 2 if quick else tables
    for drift, table in itertools.product(DRIFTS, range(count)):
        found[drift] += _compare(denominator, drift, 1_000 * seed + table) / count
    cosine, error, noise = found[DRIFTS[-1]].tolist()
    curve = [{"step": drift, "value": float(found[drift][0])} for drift in DRIFTS]
    return Measured({"cosine": cosine, "error": error, "noise": noise}, {"cosine": curve})


def _compare(denominator: Denominator, drift: float, seed: int) -> Tensor:
    """Cosine, relative error and noise of the expected gradient."""
    draw = torch.Generator().manual_seed(seed)
    every = torch.tensor(list(itertools.product(range(SYMBOLS), repeat=LENGTH)))
    before = torch.cat([torch.zeros(len(every), 1, dtype=torch.int64), every[:, :-1]], 1)
    place = torch.arange(LENGTH).expand_as(every)
    old = torch.randn(LENGTH, SYMBOLS, SYMBOLS, generator=draw, dtype=torch.float64)
    moved = old + drift * torch.randn(old.shape, generator=draw, dtype=torch.float64)
    reward = torch.rand(len(every), generator=draw, dtype=torch.float64)
    logp, old_logp = (t.log_softmax(-1)[place, before].gather(2, every[..., None])[..., 0] for t in (moved, old))
    start = torch.zeros(1, dtype=torch.int64)
    rows = [Trajectory(torch.cat([start, s]), torch.arange(LENGTH + 1) > 0) for s in every]
    batch = Batch.of([Group(rows)])
    batch.old_logp = old_logp.flatten()
    weight = denominator(batch, logp.flatten()).weight.view_as(logp)
    credit = _action_values(every, logp, reward)
    # d log softmax: one at the symbol taken, minus the probabilities of all
    score = torch.nn.functional.one_hot(every, SYMBOLS) - moved.softmax(-1)[place, before]
    table = torch.zeros(len(every), LENGTH, SYMBOLS, SYMBOLS, dtype=torch.float64)
    table.scatter_(2, before[..., None, None].expand(-1, -1, 1, SYMBOLS), score[:, :, None])
    chance, now = old_logp.sum(1).exp(), logp.sum(1).exp()
    each = ((weight * credit)[..., None, None] * table).flatten(1)
    truth = ((now[:, None] * credit)[..., None, None] * table).flatten(1).sum(0)
    mean = (chance[:, None] * each).sum(0)
    variance = (chance * each.square().sum(1)).sum() - mean.square().sum()
    cosine = (mean * truth).sum() / (mean.norm() * truth.norm())
    return torch.stack([cosine, (mean - truth).norm() / truth.norm(), variance.sqrt() / truth.norm()])


def _action_values(every: Tensor, logp: Tensor, reward: Tensor) -> Tensor:
    """Advantage of each prefix under the policy: its mean reward over that of the prefix one symbol shorter."""
    chance = logp.sum(1).exp()
    values = [torch.full_like(reward, float((chance * reward).sum()))]
    for t in range(LENGTH):
        prefix = (every[:, : t + 1] * SYMBOLS ** torch.arange(t + 1)).sum(1)
        mass, earned = (chance.new_zeros(SYMBOLS ** (t + 1)) for _ in range(2))
        mass.index_add_(0, prefix, chance)
        earned.index_add_(0, prefix, chance * reward)
        values.append((earned / mass)[prefix])
    return torch.stack([b - a for a, b in itertools.pairwise(values)], 1)


@study(method="minpro", card="178")
def prefix_estimators() -> Study:
    """Whether the smallest ratio of a prefix stands for the product of all of them, computed without sampling.

    Policies are tables of logits over three symbols and six places, small enough to sum over all 729 sequences. The
    old policy is the new one with noise of standard deviation up to 1.5 on its logits, far more than an update moves.
    Compared with the true policy gradient: the direction of what each weight gives in expectation (bias), and the
    noise of one sequence's gradient. Weights are not truncated. Rule, fixed before the run: the product is exact
    (cosine at least 0.999) and the noisiest of the two; the minimum points closer to the true gradient than the token's
    own ratio. Each seed averages over 10 pairs of tables.
    """
    weights: dict[str, Denominator] = {
        "token": OldPolicy(),
        "product": PrefixProduct(None),
        "geometric": PrefixGeometricMean(None),
        "sequence": OldPolicySequence(),
        "minimum": PrefixMinimum(None),
    }
    return Study(
        claim="Times the smallest ratio of its prefix, a token's ratio gives a gradient closer to the true one than "
        "alone, with less noise than the exact product.",
        setting="tables over 3 symbols and 6 places, all sequences enumerated, 10 pairs of policies a seed, 5 seeds.",
        arms={n: Arm(enumerated, {"denominator": d, "tables": 10}, (Batch,)) for n, d in weights.items()},
        expectations=(
            AtLeast("product", "cosine", 0.999, why="the product is the exact weight"),
            Lower("minimum", than="product", metric="noise", why="the minimum does not accumulate"),
            Better("minimum", than="token", metric="cosine", why="it corrects some of the prefix's drift"),
        ),
        seeds=5,
    )
