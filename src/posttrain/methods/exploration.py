"""Rewards for being unlike the other completions of a prompt: diversity of what is said, novelty of representations.

Notation as in `policy_gradient.py`; r_i is the task's reward, R_i what the policy is trained on.
"""

from __future__ import annotations

from typing import Literal

from posttrain.methods.policy_gradient import grpo
from posttrain.methods.registry import method
from posttrain.objective.advantage import GroupNormalised
from posttrain.objective.aggregate import TokenMean
from posttrain.reward.sameness import Judge, JudgeName, judge_from
from posttrain.reward.shapings.diversity import Classes, Diversity, Measure, RareNgrams
from posttrain.reward.shapings.novelty import Novelty
from posttrain.training.method import Method


@method(family="policy-gradient", card="071")
def darling(
    same: JudgeName | Judge = "text",
    floor: float = 0.1,
    combine: Literal["multiply", "add"] = "multiply",
    weight: float = 1.0,
    correct_only: bool = False,
    shift: bool = False,
    ngrams: int = 0,
    clip: float = 0.2,
    beta: float = 0.0,
) -> Method:
    r"""DARLING: the reward of a completion is multiplied by the share of its group that says something else.

    .. math:: R_i = r_i\,\max\Big(\frac{n - c_i}{n - 1}, 0.1\Big),\qquad A_i = R_i - \bar R

    n completions of a prompt, c_i of them in completion i's class (itself included). Classes are what the pairwise
    judge connects. The advantage is not divided by the group's standard deviation, which would blow small differences
    in diversity up where all are right; the loss is PPO's clipped one, a mean over all tokens.

    Args:
        same: when two completions say the same: `answer` (equal final answers), `text` (equal but for case,
            punctuation, white space), `words` (the paper's rule for short texts), or a callable of a list of pairs of
            texts: a trained classifier. The judge decides what to look at; `answer` alone ignores the reasoning.
        floor: the least share that is multiplied with. combine: `multiply`, or `add` (an ablation): r_i + weight times
            the share. weight: of `add`.
        correct_only: count n and c_i among completions with r_i >= 0.5; the others get the floor. The only right one
            of a group has share 1 (the released code gives it the floor).
        shift: take the group's lowest reward off first, for reward models with negative scores.
        ngrams: n > 0 measures by the share of a completion's word n-grams that no other has, in the place of classes.
        clip: ε. beta: weight of the KL (k3) to the stage's first policy (0.001 in the paper's chat setting).

    A prompt's only completion has share 1. Reference: Jointly Reinforcing Diversity and Quality in Language Model
    Generations, 2025, arXiv 2509.02534 (card 071).
    """
    measure: Measure = RareNgrams(ngrams) if ngrams else Classes(judge_from(same))
    shaping = Diversity(measure, floor, combine, weight, correct_only, shift=shift)
    return grpo(clip, beta).replace(
        advantage=GroupNormalised("none"), aggregate=TokenMean(), shaping=(shaping,)
    )  # fmt: skip


@method(family="policy-gradient", card="135", name="rep-exp")
def rep_exp(
    weight: float = 0.01,
    ridge: float = 0.01,
    dimensions: int = 32,
    relative: bool = False,
    leave_one_out: bool = False,
    clip: float = 0.2,
    beta: float = 0.0,
) -> Method:
    r"""RepExp: a bonus for completions that a frozen model represents unlike the others of their group.

    .. math:: R_i = r_i + \beta_b\, v_i^\top\Big(\lambda I + \sum_j v_j v_j^\top\Big)^{-1} v_i,\qquad
              A_i = \frac{R_i - \bar R}{\sigma_R + 10^{-4}}

    v_i is the mean of the stage's first policy's final hidden states over completion i, multiplied with a sparse random
    matrix that is drawn anew each step, and centred in its group. A group in which nothing is right (r >= 0.5) gets no
    bonus. In a group in which all are right, the division by σ makes the bonus a full-sized signal: there it explores.

    Args:
        weight: β_b. ridge: λ, in squared units of the projected states. dimensions: rows of the random matrix; at least
            the model's width means no projection.
        relative: λ is `ridge` times the mean squared length of a group's states. With an absolute λ far below it the
            bonus is (n - 1)/n for every distinct completion, and explores nothing (watch `novelty_spread`).
        leave_one_out: the bonus against the others alone, b/(1 - b).
        clip: ε. beta: weight of the KL to the stage's first policy.

    The matrix's sparsity is that of the released code (entries other than 0 at rate 1/√width). Its use at inference
    time, to look at the most novel of many completions first, is `evaluation.novelty.exploration_orders`. Reference:
    Representation-Based Exploration for Language Models, 2025, arXiv 2510.11686 (card 135).
    """
    shaping = Novelty(weight, ridge=ridge, relative=relative, dimensions=dimensions, leave_one_out=leave_one_out)
    return grpo(clip, beta).replace(aggregate=TokenMean(), shaping=(shaping,))
