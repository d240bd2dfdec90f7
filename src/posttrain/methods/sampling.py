"""Where the samples go: prompts that are undecided get more of them."""

from __future__ import annotations

from typing import Literal

from posttrain.methods.policy_gradient import grpo
from posttrain.methods.registry import method
from posttrain.objective.aggregate import TokenMean
from posttrain.objective.divergence import EntropyBonus
from posttrain.objective.mask import Clip, DualClip
from posttrain.objective.pool import PoolBaseline
from posttrain.rollout.strategies.adaptive import Exit, UntilDecided
from posttrain.training.method import Method


@method(family="data", card="128", branch="3.2a")
def reinforce_ada(
    exit: Exit = "balance",
    rounds: int = 4,
    samples: int = 8,
    threshold: float = 0.7,
    scale: Literal["none", "pool"] = "none",
    low: float = 0.2,
    high: float = 0.28,
    dual_clip: float = 10.0,
    entropy: float = 1e-4,
) -> Method:
    r"""Reinforce-Ada: sample a prompt in rounds until it is decided, train on a balanced few with the pool's baseline.

    .. math:: A_i = R_i - \bar r(x),\qquad \bar r(x) = \frac{p}{p+m}\ \text{over all that was drawn for } x

    .. math:: L = -\frac{1}{\sum_i T_i}\sum_i\sum_t
              \min(\rho_t A_i, \mathrm{clip}(\rho_t, 1-\epsilon_l, 1+\epsilon_h) A_i) - \beta_H H

    with a ceiling c on ρ where A < 0. Of the p right and m wrong completions the first n/2 right ones and then wrong
    ones make up the group of n (the setting `group`); a side that is short is filled from the other. A balanced group's
    advantages do not sum to 0: a success in 16 counts +15/16, a failure -1/16.

    Args:
        exit: a prompt is sampled no more after the round in which it has n/2 of both (`balance`) or one right
            completion (`positive`, whose pool mean is biased upwards, since sampling stops behind a success); `never`
            draws all rounds for all prompts.
        rounds: at most so many. samples: completions a prompt and round.
        threshold: a completion is right where its reward exceeds this.
        scale: `pool` divides by the pool's standard deviation.
        low, high: the clip range. dual_clip: c. entropy: β_H.

    Prompts that stay one-sided have advantage 0 and still count in the mean. The reward that is logged is that of the
    first round, where every prompt has as many samples.

    Reference: Reinforce-Ada: An Adaptive Sampling Framework for Reinforce-Style LLM Training, 2025, arXiv 2510.04996
    (card 128).
    """
    return (
        grpo()
        .replace(
            rollouts=UntilDecided(rounds, samples, exit, threshold),
            advantage=PoolBaseline(scale),
            masks=(Clip(low, high), DualClip(dual_clip)),
            aggregate=TokenMean(),
            divergences=(EntropyBonus(entropy),) if entropy else (),
        )
        .with_settings(group=4)
    )
