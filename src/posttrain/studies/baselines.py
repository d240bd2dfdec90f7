"""What peers have beside the papers of the catalogue: baselines of the reward, bounds on the update."""

from __future__ import annotations

import torch

from posttrain import methods
from posttrain.objective.batch import Batch
from posttrain.studies.arms import in_lab, trained
from posttrain.studies.registry import study
from posttrain.studies.study import Arm, Measured, Study
from posttrain.studies.verdict import Better, Expectation, Lower
from posttrain.training.loop import Trainer
from posttrain.training.method import Method
from posttrain.training.stage import source_for

STALE = {"updates": 4, "minibatches": 2, "steps": 60}


def gradient_spread(seed: int, quick: bool, *, method: Method, model: str, batches: int, preset: str) -> Measured:
    """Spread of a method's gradient over batches of fresh rollouts, by the same policy, which is never updated.

    `noise`: the unbiased variance of a batch's gradient, summed over the parameters. `spread`: the same over the
    squared norm of the mean gradient, from which the mean's own noise is taken off.
    """
    from posttrain import lab

    policy, task = lab.model(preset), lab.task(preset)
    if quick:
        batches = 4
    source = source_for(policy, method, task, seed=seed)
    trainer = Trainer(policy, method, source, seed=seed)
    found: list[torch.Tensor] = []

    def keep(rate: float) -> float:
        found.append(torch.cat([m.grad.flatten() for m in trainer.optimizer.masters if m.grad is not None]).double())
        trainer.optimizer.zero()
        return 0.0

    trainer.optimizer.step = keep  # type: ignore[method-assign]
    rollouts = 0
    for step in range(batches):
        collected = source.collect(step)
        rollouts += collected.rollouts
        trainer.step(collected)
    gradients = torch.stack(found)
    mean = gradients.mean(0)
    noise = ((gradients - mean) ** 2).sum(1).mean() * len(found) / (len(found) - 1)
    signal = (mean**2).sum() - noise / len(found)  # the mean's own noise adds to its squared norm
    return Measured({"spread": float(noise / signal.clamp(min=1e-12)), "noise": float(noise)}, rollouts=rollouts)


def spread(method: Method, preset: str = "tiers", **settings: int) -> Arm:
    """An arm that measures the spread of a method's gradient at the preset's model."""
    from posttrain import lab

    one = in_lab(method, updates=1, steps=100, **settings)
    arguments = {"method": one, "model": lab.preset(preset).key, "batches": 60, "preset": preset}
    return Arm(gradient_spread, arguments, (Batch, source_for))


@study(method=("opo", "remax", "otb"), card=(), family="policy-gradient")
def reward_baselines() -> Study:
    """A baseline leaves the gradient's expectation alone and takes noise out of it.

    The gradient of 60 fresh batches (16 prompts, 8 completions) is taken at one policy, the lab model `tiers`, which is
    never updated; noise is the unbiased variance of the gradient, summed over the parameters. Four arms by the same
    plain policy gradient, a mean over all tokens: no baseline, OPO's length-weighted mean, ReMax's greedy answer, and
    OTB's baseline a token. Rule, fixed before the run: each baseline's noise is lower than without one, with the 95 %
    interval of the paired difference over five seeds below 0. (ReMax draws a ninth completion a prompt, greedily.)
    """
    rules: tuple[Expectation, ...] = tuple(
        Lower(name, than="none", metric="noise", why="what a baseline is for") for name in ("opo", "remax", "otb")
    )
    return Study(
        claim="The baselines of OPO, ReMax and OTB lower the variance of the policy gradient.",
        setting="lab model tiers, no training: 60 batches of 16 prompts x 8 completions a seed, equal for all arms.",
        arms={
            "none": spread(methods.reinforce("none")),
            "group mean": spread(methods.reinforce("group")),
            "opo": spread(methods.opo()),
            "remax": spread(methods.remax()),
            "otb": spread(methods.otb(clip=1e9)),
        },
        expectations=rules,
        seeds=5,
    )


@study(method="gpg", card=())
def gpg() -> Study:
    """GPG rescales a step by how many of its groups are undecided, and divides by no standard deviation.

    GRPO and GPG on the lab model `tiers` (easy, medium and hard additions), 100 steps of 16 prompts x 8 completions,
    learning rate 3e-4 for both. The paper claims to beat GRPO. Rule: its accuracy is better, with the interval above 0.
    """
    return Study(
        claim="GPG reaches a higher accuracy than GRPO at equal rollouts.",
        setting="lab model tiers, 100 steps x 16 prompts x 8 completions, 4 seeds.",
        arms={
            "grpo": trained(in_lab(methods.grpo()), preset="tiers"),
            "gpg": trained(in_lab(methods.gpg()), preset="tiers"),
        },
        expectations=(Better("gpg", than="grpo", metric="accuracy"),),
        seeds=4,
    )


@study(method="grpo-passk", card=())
def grpo_passk() -> Study:
    """Credit for the best of a group alone should raise the chance that one of several attempts is right.

    GRPO and GRPO for pass@k on `tiers`, 100 steps of 16 prompts x 8 completions, 3e-4 for both. With 0/1 rewards a
    group teaches only where exactly one of its eight completions is right, which is mostly on hard problems. Rule:
    pass@8 on the hard tier is better than GRPO's with the interval above 0.
    """
    return Study(
        claim="GRPO for pass@k raises pass@8 on hard problems above GRPO's.",
        setting="lab model tiers, 100 steps x 16 prompts x 8 completions, 4 seeds.",
        arms={
            "grpo": trained(in_lab(methods.grpo()), preset="tiers"),
            "grpo-passk": trained(in_lab(methods.grpo_passk()), preset="tiers"),
        },
        expectations=(Better("grpo-passk", than="grpo", metric="pass@8/hard"),),
        seeds=4,
    )


@study(method=("clip-cov", "kl-cov"), card=())
def covariance() -> Study:
    """Holding back the tokens of highest covariance keeps the policy's entropy up, at no cost in accuracy.

    A step has about 500 completion tokens here, so the share of held-back tokens is 2 % instead of the papers' 0.02 %
    (10 tokens a step). Several updates a step, without which KL-Cov is GRPO without clipping. `tiers`, 60 steps of 16
    prompts x 8 completions, four passes of two minibatches, 3e-4 for all. Rule: final entropy above GRPO's with the
    interval above 0, and accuracy not lower than GRPO's by more than 3 points.
    """
    share = 0.02
    arms = {
        "grpo": trained(in_lab(methods.grpo(), **STALE), preset="tiers"),
        "clip-cov": trained(in_lab(methods.clip_cov(share=share, low=0.05, high=5.0), **STALE), preset="tiers"),
        "kl-cov": trained(in_lab(methods.kl_cov(share=share), **STALE), preset="tiers"),
    }
    rules: list[Expectation] = []
    for name in ("clip-cov", "kl-cov"):
        rules.append(Better(name, than="grpo", metric="entropy"))
        rules.append(Better(name, than="grpo", metric="accuracy", margin=-0.03))
    return Study(
        claim="Clip-Cov and KL-Cov keep entropy higher than GRPO without losing accuracy.",
        setting="lab model tiers, 60 steps x 16 prompts x 8 completions, 4 passes of 2 minibatches, 4 seeds.",
        arms=arms,
        expectations=tuple(rules),
        seeds=4,
    )


@study(method=("gmpo", "dppo"), card=())
def trust_regions() -> Study:
    """Where a step is used for several updates, another trust region than the token ratio's should pay.

    GRPO, GMPO (geometric mean of clipped ratios) and DPPO (bound on the total variation, 0.2) on `tiers`, 60 steps of
    16 prompts x 8 completions, four passes of two minibatches, 3e-4 for all. Rule: accuracy above GRPO's with the
    interval above 0.
    """
    return Study(
        claim="GMPO and DPPO reach a higher accuracy than GRPO under stale updates.",
        setting="lab model tiers, 60 steps x 16 prompts x 8 completions, 4 passes of 2 minibatches, 4 seeds.",
        arms={
            "grpo": trained(in_lab(methods.grpo(), **STALE), preset="tiers"),
            "gmpo": trained(in_lab(methods.gmpo(), **STALE), preset="tiers"),
            "dppo": trained(in_lab(methods.dppo(), **STALE), preset="tiers"),
        },
        expectations=(
            Better("gmpo", than="grpo", metric="accuracy"),
            Better("dppo", than="grpo", metric="accuracy"),
        ),
        seeds=4,
    )
