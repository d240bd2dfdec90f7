r"""Which data to train on, and when: curricula over distributions, answer formats and mixtures.

The objective is GRPO's; notation as in `policy_gradient.py`. Domains and formats are read from the prompts' `meta`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from posttrain.data.bandit import UpperConfidence
from posttrain.data.domains import ByDomain
from posttrain.methods.policy_gradient import ONLINE, grpo
from posttrain.methods.registry import method
from posttrain.methods.supervised import raft
from posttrain.reward.answer_formats import FORMATS
from posttrain.reward.shapings.format_gate import FormatGate
from posttrain.training.method import Method, Pipeline
from posttrain.trajectory import PosttrainError


@method(family="data", card="087")
def dump(tau: float = 0.1, window: int = 300, clip: float = 0.2, beta: float = 0.001, by: str = "domain") -> Method:
    r"""DUMP: rows come from the distributions with the largest mean absolute advantage, and from those seen little.

    .. math:: \mathrm{UCB}_d = \frac{1}{|W_d|}\sum_{a \in W_d} |a| + \sqrt{\frac{2\ln(N+1)}{n_d+1}},\qquad
              P(d) \propto e^{\mathrm{UCB}_d/\tau}

    W_d are the advantages of the last completions on distribution d, n_d how many there were, N their sum over d. With
    0/1 rewards and success rate s the mean absolute advantage is about :math:`2\sqrt{s(1-s)}`: 0 where everything or
    nothing is solved. Everything else is GRPO.

    Args:
        tau: τ; at 0.1 a difference of 0.2 in mean advantage makes odds of 7 to 1. window: |W_d| in completions.
        clip: ε. beta: weight of the KL to the stage's first policy.
        by: which label in a prompt's `meta` names its distribution.

    Settled here: advantages are GRPO's own (divided by the unbiased standard deviation), so they are
    :math:`\sqrt{(G-1)/G}` times those above. A distribution's rows come in an order of their own, each once before any
    comes again. The bonus counts completions and so is gone after a few steps. A distribution whose rewards are noise
    keeps a large mean absolute advantage and is drawn again and again: keep such data out.
    Reference: DUMP: Automated Distribution-Level Curriculum Learning for RL-based LLM Post-training, 2025, arXiv
    2504.09710 (card 087).
    """
    return grpo(clip, beta).replace(sampler=partial(UpperConfidence, temperature=tau, window=window, by=by))


@method(family="vision-language", card="014")
def curr_reft(
    judge: int = 600,
    choice: int = 550,
    open: int = 2300,
    closing: int = 2000,
    accept: float = 0.85,
    beta: float = 0.04,
    by: str = "format",
) -> Pipeline:
    r"""Curr-ReFT: the same problems as judgements, then choices, then open; last, imitation of accepted answers.

    .. math:: L = -\frac1\#\sum_i\frac1{T_i}\sum_t \big(e^{\log\pi_\theta - \mathrm{sg}\log\pi_\theta} A_i
              - \beta\,\mathrm{KL}_{k3}\big),\qquad A_i = \frac{R_i - \bar R}{\sigma_R + 10^{-4}}

    Three stages of GRPO with one update a step, each from the weights of the one before, which are also its reference;
    then the mean negative log-likelihood of the policy's own accepted answers. Where open answers are rarely right,
    almost no group of them has a signal; judgements and choices of the same problems do.

    Args:
        judge, choice, open, closing: optimizer steps of each stage; 0 leaves it out.
        accept: the reward that an answer must reach to be imitated (the paper's judge: 85 of 100).
        beta: weight of the KL to the stage's first policy. by: which label in a prompt's `meta` names its format.

    The task holds its problems in the formats `judge`, `choice` and `open` (`evaluation.reposed.reposed` makes it of
    any task), with a reward that scores each in its own (verifier `in_format`); the format reward of the paper is the
    verifier `format`. Settled here: the judge of the last stage is the task's reward, and answers are drawn by the
    policy of every step instead of once before. The group is 4, in the choices 2; the last stage's learning rate is a
    fifth of the others', as in the paper.
    Reference: Boosting the Generalization and Reasoning of Vision Language Models with Curriculum Reinforcement
    Learning, 2025, arXiv 2503.07065 (card 014); on text.
    """
    if min(judge, choice, open, closing) < 0 or not judge + choice + open + closing:
        raise PosttrainError(
            f"curr-reft: got {judge}, {choice}, {open} and {closing} steps; expected numbers from 0, some above it"
        )
    stages = []
    for form, steps, group in zip(FORMATS, (judge, choice, open), (4, 2, 4), strict=True):
        stage = grpo(beta=beta).replace(masks=(), sampler=partial(ByDomain, weights={form: 1.0}, by=by))
        stages.append((stage.replace(name=f"curr-reft-{form}").with_settings(group=group), steps))
    last = raft(accept).replace(name="curr-reft-closing")
    stages.append((last.with_settings(group=4, learning_rate=ONLINE.learning_rate / 5, warmup=0.05), closing))
    return Pipeline(tuple(stage.with_settings(steps=steps) for stage, steps in stages if steps))


@method(family="data", card="034")
def modomodo(
    weights: Mapping[str, float] | None = None,
    beta: float = 0.04,
    clip: float = 0.2,
    gate: str | None = None,
    by: str = "domain",
) -> Method:
    r"""MoDoMoDo: GRPO on a mixture of domains whose weights a response surface predicts to be best.

    .. math:: d \sim \mathrm{Categorical}(w),\qquad w^* = \arg\max_{w \in \Delta} \hat L(w),\qquad
              \hat L(w) = a + b^\top w + w^\top C w

    Here is the training on one mixture w. The weights come from `data.mixture_weights`: train on each of
    `seed_mixtures(domains)`, write down a `Record` of the weights and the score on tests of other domains, and take the
    first rows of `propose(records, domains)`, or one of the `RULES` (alpha, coli, norm).

    Args:
        weights: w by domain, relative to their sum; domains not named are left out. None: all alike.
        beta: weight of the KL to the stage's first policy. clip: ε.
        gate: a component of the reward without which the whole reward is 0 (the paper's format reward).
        by: which label in a prompt's `meta` names its domain.

    Settled here: a domain that is exhausted begins anew, so that the length of a run does not depend on w. The group is
    6. Reference: MoDoMoDo: Multi-Domain Data Mixtures for Multimodal LLM Reinforcement Learning, 2025, arXiv 2505.24871
    (card 034); on text.
    """
    sampler = partial(ByDomain, weights=None if weights is None else dict(weights), by=by)
    shaping = (FormatGate(gate),) if gate is not None else ()
    return grpo(clip, beta).replace(sampler=sampler, shaping=shaping).with_settings(group=6)
