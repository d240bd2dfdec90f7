"""Rollouts of another policy: what a prefix's ratios are worth, and what an engine that differs asks for."""

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
from posttrain.rollout.strategies.low_precision import LowPrecision
from posttrain.studies.arms import in_lab, trained
from posttrain.studies.registry import study
from posttrain.studies.study import Arm, Measured, Study
from posttrain.studies.verdict import AtLeast, Better, Lower
from posttrain.training.method import Method
from posttrain.training.stage import Trained
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


# -- in training -----------------------------------------------------------------------------------------------------

REUSED = {"steps": 15, "updates": 2, "minibatches": 8, "learning_rate": 1e-4, "max_tokens": 48}


@study(method="minpro", card="178")
def minpro() -> Study:
    """Whether the minimum of a prefix's ratios keeps training stable where rollouts are used again and again.

    The lab model `working` writes its additions out, about 17 tokens a completion, so that there are prefixes to speak
    of. A step's 16 prompts x 8 completions are used for 16 updates (two passes of eight minibatches), 15 steps in all.
    The learning rate is 1e-4 for all arms: in a pilot with a seed that is not among the study's, 3e-5 left MinPRO and
    the token ratio equal (51 % both, from 42 % before training) and 3e-4 destroyed the model under either, so this is
    where staleness begins to hurt. Weights of the token ratio (CISPO), the prefix's product and MinPRO are bounded
    above at 1.28 alike; GRPO and GSPO have their own clipping.

    Rule, fixed before the run: MinPRO's final accuracy is above that of GRPO, GSPO and CISPO, each interval above 0.
    """

    def arm(method: Method) -> Arm:
        return trained(in_lab(method, **REUSED), preset="working", samples=4, ks=(1, 4), prompts=128)

    return Study(
        claim="With many updates on each batch of rollouts MinPRO ends at a higher accuracy than GRPO, GSPO and CISPO.",
        setting="lab model working, 15 steps x 16 prompts x 8 completions, 16 updates a step at 1e-4, 4 seeds.",
        arms={
            "grpo": arm(methods.grpo()),
            "gspo": arm(methods.gspo()),
            "cispo": arm(methods.cispo(1.28)),
            "minpro": arm(methods.minpro()),
            "product": arm(methods.minpro(prefix="product")),
        },
        expectations=tuple(Better("minpro", than=n, metric="accuracy") for n in ("grpo", "gspo", "cispo")),
        seeds=4,
    )


ROUGH = LowPrecision(3)


def mismatch(policy: CausalPolicy, task: Task, run: Trained) -> dict[str, float]:
    """Means over the last quarter of the steps: KL of the engine to the trainer with the same weights (`engine_kl`,
    nats a token), reward, and the share of masked tokens."""
    late = run.metrics[-max(1, len(run.metrics) // 4) :]
    # with a single update the policy that learns is the one that sampled
    kl = "engine_kl" if "engine_kl" in late[0] else "sampler_kl"
    names = {"engine_kl": kl, "reward": "reward", "masked": "clip_fraction"}
    return {name: sum(m.get(metric, 0.0) for m in late) / len(late) for name, metric in names.items()}


@study(method="minirl", card="181")
def minirl() -> Study:
    """Whether a sampler that computes otherwise than the trainer must be corrected, and stale updates masked.

    Completions are drawn by a copy of the policy with its weights rounded to 3 bits, refreshed every step; its KL to
    the policy is about 0.13 nats a token at first, a gross version of what separates an FP8 engine from a BF16 trainer
    (4 bits: 0.02). The model is `tiers`, 16 prompts x 8 completions a step, 3e-4 for all. On-policy (60 steps, one
    update each): MiniRL, and the same with the trainer's own probabilities in the engine's place, so that the weight is
    1. Off-policy (30 steps of eight minibatches): MiniRL, and the same without the mask.

    Rule, fixed before the run: without the correction the final accuracy is lower on-policy; without the mask it is
    lower off-policy; each interval beyond 0. That a division by length is worse cannot be tested here, where
    completions have three to five tokens.
    """
    on, off = {"steps": 60}, {"steps": 30, "minibatches": 8}

    def arm(method: Method, settings: dict[str, int]) -> Arm:
        return trained(in_lab(method.replace(rollouts=ROUGH), **settings), preset="tiers", extra=mismatch)

    return Study(
        claim="Under an engine that differs from the trainer, leaving out the correction against it costs accuracy "
        "on-policy, and leaving out the mask costs accuracy off-policy.",
        setting="lab model tiers, sampled with 3-bit weights, trained in fp32, 16 prompts x 8 completions a step: 60 "
        "steps of one update, 30 steps of eight; 4 seeds.",
        arms={
            "minirl": arm(methods.minirl(), on),
            "without correction": arm(methods.minirl().replace(denominator=ClippedWeight(5.0)), on),
            "minirl, stale": arm(methods.minirl(), off),
            "without mask, stale": arm(methods.minirl().replace(masks=()), off),
        },
        expectations=(
            Lower("without correction", than="minirl", metric="accuracy", why="the gradient is that of another policy"),
            Lower("without mask, stale", than="minirl, stale", metric="accuracy", why="late updates go too far"),
        ),
        seeds=4,
    )


@study(method="minirl", card="181")
def routing_replay() -> Study:
    """Whether replaying the engine's experts brings a mixture of experts' trainer closer to its engine.

    The lab model `moe` (two of eight experts a token and layer) is sampled with its weights, routers included, rounded
    to 3 bits, and trained by MiniRL in eight minibatches a step, 30 steps of 16 prompts x 8 completions at 3e-4. Three
    arms: the routers choose; R2 replays the experts that the trainer chose before the step's first update; R3 those of
    the engine.

    Rule, fixed before the run: with R3 the KL of the engine to the trainer, same weights, is lower than without; and
    with R3 the final accuracy is higher, as the paper finds for four and more minibatches; each interval beyond 0. The
    paper's order of magnitude is not to be expected: here every weight is rounded, and not the routing alone differs.
    """

    def arm(routing: str) -> Arm:
        method = methods.minirl(routing=routing).replace(rollouts=ROUGH)  # type: ignore[arg-type]
        return trained(in_lab(method, steps=30, minibatches=8), preset="moe", extra=mismatch)

    return Study(
        claim="Replaying the engine's experts (R3) lowers the KL between engine and trainer, and pays in accuracy when "
        "rollouts are used for eight updates.",
        setting="lab model moe, sampled with 3-bit weights, 30 steps x 16 prompts x 8 completions, eight minibatches, "
        "4 seeds.",
        arms={"none": arm("none"), "R2": arm("trainer"), "R3": arm("sampler")},
        expectations=(
            Lower("R3", than="none", metric="engine_kl", why="the same experts leave the same numbers to differ less"),
            Better("R3", than="none", metric="accuracy", why="the paper's finding for stale updates"),
        ),
        seeds=4,
    )
