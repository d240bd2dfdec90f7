"""Learning from rewards with rollouts of another policy: an older one, or one that an engine computed differently.

Notation as in policy_gradient.py; μ is the policy as the engine computed it.
"""

from __future__ import annotations

from typing import Literal

from posttrain.methods.policy_gradient import grpo
from posttrain.methods.registry import method
from posttrain.objective.advantage import GroupNormalised
from posttrain.objective.aggregate import SequenceSum, TokenMean
from posttrain.objective.mask import Clip, DropClipped
from posttrain.objective.prefix_ratio import PrefixGeometricMean, PrefixMinimum, PrefixProduct, PrefixRatio
from posttrain.objective.sampler_ratio import SamplerCorrected
from posttrain.training.method import Method
from posttrain.trajectory import PosttrainError

Prefix = Literal["minimum", "product", "geometric"]


@method(family="policy-gradient", card="178")
def minpro(
    high: float = 0.28,
    low: float = 0.2,
    form: Literal["weight", "clip"] = "weight",
    prefix: Prefix = "minimum",
    cap_one: bool = False,
    floor: float = 0.0,
) -> Method:
    r"""MinPRO: a token's ratio times the smallest one before it, in the place of the product over its whole prefix.

    .. math:: \tilde\rho_t = \rho_t\,\min_{i<t}\rho_i,\qquad
              L = -\frac{1}{\sum_i T_i}\sum_i\sum_t \mathrm{sg}[\min(\tilde\rho_{it}, 1+\epsilon_h)]\,A_i\,
              \log\pi_\theta(y_{it})

    The exact weight under rollouts of an old policy is the product of the prefix's ratios, which explodes or vanishes
    with length; the minimum does not accumulate. It is meant for stale rollouts: by default a step's are used in eight
    minibatches (with a single update a step every ratio is 1, and the method is GRPO with a mean over tokens).

    The paper leaves the form open: as here the weight is constant and bounded above, as in CISPO; `clip` is PPO's form,
    :math:`\min(\tilde\rho A, \mathrm{clip}(\tilde\rho) A)`, with a gradient through the token's own ratio alone.

    Args:
        high, low: ε_h, and in the form `clip` also ε_l.
        form: `weight` or `clip`.
        prefix: `minimum`; for comparison `product` (exact) and `geometric` (mean of the ratios up to the token). The
            token's ratio alone is `cispo`, a whole sequence's is `gspo`.
        cap_one: count a minimum above 1 as 1. floor: count a smaller minimum as this, so that one outlier does not
            silence the rest of a completion (0: none).

    Reference: A Step Back: Prefix Importance Ratio Stabilizes Policy Optimization, 2026, arXiv 2601.22718 (card 178).
    """
    if form not in ("weight", "clip"):
        raise PosttrainError(f"form is {form!r}; expected weight or clip")
    bound = 1 + high if form == "weight" else None
    kinds: dict[str, PrefixRatio] = {
        "minimum": PrefixMinimum(bound, cap_one, floor),
        "product": PrefixProduct(bound),
        "geometric": PrefixGeometricMean(bound),
    }
    if prefix not in kinds:
        raise PosttrainError(f"prefix is {prefix!r}; expected one of {', '.join(kinds)}")
    masks = () if form == "weight" else (Clip(low, high),)
    made = grpo().replace(denominator=kinds[prefix], masks=masks, aggregate=TokenMean())
    return made.with_settings(batch=16, minibatches=8)


@method(family="policy-gradient", card="181")
def minirl(
    low: float = 0.2,
    high: float = 0.27,
    bound: float = 5.0,
    routing: Literal["none", "trainer", "sampler"] = "none",
) -> Method:
    r"""MiniRL: REINFORCE with what keeps its token-level surrogate a valid approximation, and nothing else.

    .. math:: L = -\frac{1}{\#}\sum_i\sum_t M_{it}\,\mathrm{sg}\big[\min(\pi_\theta/\mu, 5)\big]\,(R_i - \bar R)\,
              \log\pi_\theta(y_{it})

    To first order the weight of a whole sequence is one plus the sum of its tokens' deviations, so the sum over tokens
    stands for the sequence's objective as long as every ratio is near 1. A ratio departs from 1 by what the engine
    computes differently (corrected by the weight, against the engine's own μ) and by the policy's age: the mask M drops
    tokens whose :math:`\pi_\theta/\pi_{old}` has left the band in the direction that the advantage asks for. The sum is
    not divided by lengths, nor the reward by its deviation: scales are those of the rewards, and long completions
    weigh more.

    μ comes with the rollouts, at the sampling temperature and over the full vocabulary: leave top-p and top-k off, or
    it is not what sampled.

    Args:
        low, high: the band of :math:`\pi_\theta/\pi_{old}`. bound: the largest weight.
        routing: for mixtures of experts, whose experts an update uses: its own routers' (`none`), those that the
            trainer chose before the step's first update (`trainer`, R2), or those of the engine (`sampler`, R3). The
            paper takes none on-policy, R2 for two minibatches and R3 for four and more. The gates are always computed
            from the present weights; replay biases the policy that is optimised.

    Reference: Stabilizing Reinforcement Learning with LLMs: Formulation and Practices, 2025, arXiv 2512.01374
    (card 181).
    """
    if routing not in ("none", "trainer", "sampler"):
        raise PosttrainError(f"routing is {routing!r}; expected none, trainer or sampler")
    return grpo().replace(
        advantage=GroupNormalised("none"),
        denominator=SamplerCorrected(bound),
        masks=(DropClipped(low, high),),
        aggregate=SequenceSum(),
        replay_experts=None if routing == "none" else routing,
    )
