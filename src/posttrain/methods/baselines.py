"""What peers have beside the papers of the catalogue: other baselines for the reward, other bounds on the update.

Notation as in policy_gradient.py.
"""

from __future__ import annotations

from typing import Literal

from posttrain.methods.policy_gradient import ONLINE, grpo
from posttrain.methods.registry import method
from posttrain.objective.aggregate import TokenMean
from posttrain.objective.baselines import (
    AgainstFact,
    BestOverSecond,
    LengthWeighted,
    OptimalTokenBaseline,
    UndecidedRescaled,
)
from posttrain.objective.covariance import DropHighCovariance, HighCovarianceKL
from posttrain.objective.denominator import ClippedWeight, CurrentPolicy
from posttrain.objective.estimator import Objective
from posttrain.objective.mask import Clip
from posttrain.objective.trust_region import ClippedGeometricMean, DivergenceBand, InsideBand
from posttrain.rollout.strategies.greedy import GreedyBeside
from posttrain.training.method import Method


@method(family="policy-gradient")
def grpo_passk(clip: float = 0.2, scale: bool = True) -> Method:
    r"""GRPO for pass@k: only the best completion of a group earns credit, by how far it leads the second.

    .. math:: A_i = \frac{R_{(1)} - R_{(2)}}{\sigma_R + 10^{-6}}\ \text{for the best, 0 for the others}

    With 0/1 rewards a group learns only where exactly one completion is right.

    Args:
        clip: ε. scale: divide by the group's standard deviation.

    Reference: Optimizing language models for inference time objectives, 2025, arXiv 2503.19595; as in verl.
    """
    return grpo(clip).replace(advantage=BestOverSecond(scale))


@method(family="policy-gradient")
def opo() -> Method:
    r"""On-policy optimisation with the optimal reward baseline: the group's mean reward weighted with length.

    .. math:: A_i = R_i - \frac{\sum_j T_j R_j}{\sum_j T_j},\qquad
              L = -\frac{1}{\sum_i T_i}\sum_i\sum_t A_i\log\pi_\theta(y_{it})

    One update a step, no clipping, no KL. The mean over all tokens is this library's choice.

    Reference: On-policy RL with optimal reward baseline, 2025, arXiv 2505.23585.
    """
    return Method("opo", Objective(LengthWeighted(), CurrentPolicy()), "prompts", ONLINE)


@method(family="policy-gradient")
def remax() -> Method:
    r"""ReMax: the baseline is the reward of the greedy answer to the same prompt.

    .. math:: L = -\frac{1}{\sum_i T_i}\sum_i\sum_t \big(R_i - R(y^{greedy})\big)\log\pi_\theta(y_{it})

    The paper draws one completion a prompt (group 1 works here too); with more they share the greedy one.

    Reference: ReMax, 2023, arXiv 2310.10505.
    """
    objective = Objective(AgainstFact("greedy"), CurrentPolicy())
    return Method("remax", objective, "prompts", ONLINE, rollouts=GreedyBeside())


@method(family="policy-gradient")
def gpg() -> Method:
    r"""Group policy gradient: the plain policy gradient over the group's mean, rescaled for groups that say nothing.

    .. math:: A_i = \alpha\,(R_i - \bar R),\quad \alpha = \frac{\#\text{completions}}{\#\text{in undecided groups}},
              \qquad L = -\frac{1}{\sum_i T_i}\sum_i\sum_t A_i\log\pi_\theta(y_{it})

    (verl counts completions of non-zero reward in the place of those in undecided groups.)

    Reference: GPG: a simple and strong reinforcement learning baseline for model reasoning, 2025, arXiv 2504.02546.
    """
    return Method("gpg", Objective(UndecidedRescaled(), CurrentPolicy()), "prompts", ONLINE)


@method(family="policy-gradient")
def otb(clip: float = 0.2) -> Method:
    r"""Optimal token baseline: every token is compared with the group's members at the same place.

    They are weighed by how much gradient they have accumulated up to there.

    .. math:: A_{it} = G_{it} - \frac{\sum_j G_{jt} W_{jt}}{\sum_j W_{jt}},\qquad
              W_{jt} = \sum_{s\le t}\big(1 - 2\pi(y_{js}) + \textstyle\sum_v\pi(v)^2\big)

    A token further on than any other member goes is compared with the group's mean reward (a choice of this library).

    Args:
        clip: ε.

    Reference: Optimal token baseline: variance reduction for long-horizon LLM-RL, 2026, arXiv 2602.07078; as in verl.
    """
    return grpo(clip).replace(advantage=OptimalTokenBaseline(), aggregate=TokenMean())


@method(family="policy-gradient")
def clip_cov(clip: float = 0.2, share: float = 2e-4, low: float = 1.0, high: float = 5.0) -> Method:
    r"""Clip-Cov: GRPO in which a few of the tokens that take the most entropy away have no gradient.

    .. math:: \mathrm{Cov}_t = (A_t - \bar A)(\log\pi_t - \overline{\log\pi}),\qquad
              \text{mask a random share of } \{t: low < \mathrm{Cov}_t < high\}

    Args:
        clip: ε. share: of the step's tokens to mask, at least one. low, high: the band they are drawn from.

    Reference: The entropy mechanism of RL for reasoning language models, 2025, arXiv 2505.22617.
    """
    masks = (Clip(clip, clip), DropHighCovariance(share, low, high))
    return grpo().replace(masks=masks, aggregate=TokenMean())


@method(family="policy-gradient")
def kl_cov(share: float = 2e-4, coefficient: float = 1.0) -> Method:
    r"""KL-Cov: GRPO without clipping, and a penalty that holds the tokens of highest covariance near the old policy.

    .. math:: L = -\frac{1}{\sum_i T_i}\sum_{i,t}\big(\rho_{it}A_i - c\,1[it \in \mathrm{top}]\,
              |\log\pi_\theta - \log\pi_{old}|\big)

    Args:
        share: of the step's tokens, by covariance, at least one. coefficient: c.

    It differs from GRPO without clipping only where a step has several updates (two by default here).
    Reference: The entropy mechanism of RL for reasoning language models, 2025, arXiv 2505.22617.
    """
    parts = grpo().replace(masks=(), aggregate=TokenMean(), divergences=(HighCovarianceKL(coefficient, share),))
    return parts.with_settings(updates=2)


@method(family="policy-gradient")
def gmpo(low: float = 0.4, high: float = 0.4) -> Method:
    r"""Geometric-mean policy optimisation: a sequence's objective is the geometric mean of its clipped token ratios.

    .. math:: L = -\frac1\#\sum_i A_i \Big(\prod_t \mathrm{clip}_{A_i}(\rho_{it}, e^{-low}, e^{high})\Big)^{1/T_i}

    the clip acting on the side that the advantage asks for.

    Args:
        low, high: the band of the log-ratio.

    Reference: Geometric-mean policy optimization, 2025, arXiv 2507.20673.
    """
    return grpo().replace(denominator=ClippedGeometricMean(low, high), masks=(InsideBand(low, high),))


@method(family="policy-gradient")
def dppo(divergence: Literal["tv", "kl"] = "tv", low: float = 0.2, high: float = 0.2, truncate: float = 20.0) -> Method:
    r"""DPPO: the trust region is a bound on the divergence of the two policies at a token, not on their ratio.

    .. math:: L = -\frac{1}{\sum_i T_i}\sum_{i,t} 1[D_{it} \le \delta \text{ or moving back}]\;
              \mathrm{sg}[\min(\rho_{it}, C)]\,A_i\log\pi_\theta(y_{it})

    Args:
        divergence: D, `tv` (difference of the token's probabilities) or `kl` (of "this token or another").
        low, high: δ for falling and rising probabilities. truncate: C.

    Reference: Rethinking the trust region in LLM reinforcement learning, 2026, arXiv 2602.04879.
    """
    if divergence not in ("tv", "kl"):
        raise ValueError(f"divergence is {divergence!r}; expected tv or kl")
    return grpo().replace(
        denominator=ClippedWeight(truncate), masks=(DivergenceBand(low, high, divergence),), aggregate=TokenMean()
    )
