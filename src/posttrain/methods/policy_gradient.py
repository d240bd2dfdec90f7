"""Learning from rewards: REINFORCE, PPO, GRPO and its relatives.

Notation: `R_i` reward of completion i of a group of G, ρ_t the token ratio π_θ/π_old, A the advantage, T_i a length.
Learning rates are those that suit a model of 135 million parameters; the papers' (about 1e-6) suit billions.
"""

from __future__ import annotations

from posttrain.data.sampler import Undecided
from posttrain.methods.registry import method
from posttrain.objective.advantage import (
    GAE,
    DecoupledGroupNormalised,
    GroupNormalised,
    LeaveOneOut,
    Return,
    WhitenedReturn,
)
from posttrain.objective.aggregate import ConstantLength, SequenceMean, TokenMean
from posttrain.objective.denominator import (
    ClippedWeight,
    CurrentPolicy,
    OldPolicy,
    OldPolicyCompletion,
    OldPolicySequence,
)
from posttrain.objective.divergence import CriticLoss, Divergence, ReferenceKL
from posttrain.objective.estimator import Objective
from posttrain.objective.mask import Clip, DropTruncated
from posttrain.training.method import Method
from posttrain.training.settings import Settings

ONLINE = Settings(steps=100, batch=8, group=8, learning_rate=5e-6, schedule="constant", max_tokens=128)


def _kl(beta: float) -> tuple[Divergence, ...]:
    return (ReferenceKL(beta),) if beta else ()


@method(family="policy-gradient")
def reinforce(baseline: str = "batch") -> Method:
    r"""REINFORCE: the log-likelihood of what was sampled, weighted with its reward over a baseline.

    .. math:: L = -\frac{1}{N}\sum_i\sum_t (R_i - b)\,\log\pi_\theta(y_{it})

    Args:
        baseline: b is `none` (0), `batch` (mean reward of the step) or `group` (mean reward of the prompt's group).

    Reference: Williams, Simple statistical gradient-following algorithms for connectionist reinforcement learning,
    1992.
    """
    if baseline not in ("none", "batch", "group"):
        raise ValueError(f"baseline is {baseline!r}; expected none, batch or group")
    objective = Objective(Return(baseline), CurrentPolicy())  # type: ignore[arg-type]
    return Method("reinforce", objective, "prompts", ONLINE)


@method(family="policy-gradient", card="044")
def ppo(
    clip: float = 0.2, gamma: float = 1.0, lam: float = 0.95, kl: float = 0.05, value: float = 0.1, updates: int = 4
) -> Method:
    r"""PPO with a critic and generalised advantage estimation.

    .. math:: L = -\frac1N\sum_t \min(\rho_t A_t,\ \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon) A_t)
              + c_v\,\tfrac12\max((V-R)^2, (\mathrm{clip}(V, V_{old}\pm 0.2)-R)^2)

    A_t is GAE(γ, λ) over the per-token reward :math:`-\beta(\log\pi_{old}-\log\pi_{ref})` with the outcome reward at
    the last token, whitened over the step.

    Args:
        clip: ε. gamma, lam: of GAE. kl: β of the penalty in the reward. value: c_v. updates: passes over the rollouts.

    The critic is a linear head on the policy's (detached) hidden states, a choice of this library: papers train a
    second network. Reference: PPO, 2017, arXiv 1707.06347; for language models as in Tülu 3 (card 044).
    """
    objective = Objective(GAE(gamma, lam, kl), OldPolicy(), (Clip(clip, clip),), TokenMean(), (CriticLoss(value),))
    method = Method("ppo", objective, "prompts", ONLINE, critic=True)
    return method.with_settings(updates=updates)


@method(family="policy-gradient", card="046")
def grpo(clip: float = 0.2, beta: float = 0.0) -> Method:
    r"""Group relative policy optimisation: the group's mean is the baseline, its standard deviation the scale.

    .. math:: L = -\frac1{\#}\sum_i \frac1{T_i}\sum_t \min(\rho_t A_i, \mathrm{clip}(\rho_t, 1\mp\epsilon) A_i)
              + \beta\,\mathrm{KL}_{k3},\qquad A_i = \frac{R_i - \bar R}{\sigma_R + 10^{-4}}

    Args:
        clip: ε. beta: weight of the KL to the stage's first policy (0: no reference model is kept).

    Reference: DeepSeekMath, 2024, arXiv 2402.03300 (row GRPO of card 046).
    """
    objective = Objective(GroupNormalised(), OldPolicy(), (Clip(clip, clip),), SequenceMean(), _kl(beta))
    return Method("grpo", objective, "prompts", ONLINE)


@method(family="policy-gradient", card="046")
def dr_grpo(clip: float = 0.2, beta: float = 0.0, length: int = 128) -> Method:
    r"""Dr. GRPO ("done right"): GRPO without its two biases, the division by the group's σ and by each length.

    .. math:: L = -\frac1{\#\,L_{max}}\sum_i\sum_t \min(\rho_t A_i, \mathrm{clip}(\rho_t) A_i),\qquad A_i = R_i - \bar R

    Args:
        clip: ε. beta: KL weight. length: L_max in tokens, a constant (set it to `max_tokens`).

    Reference: Understanding R1-Zero-like training, 2025, arXiv 2503.20783 (card 046).
    """
    return grpo(clip, beta).replace(advantage=GroupNormalised("none"), aggregate=ConstantLength(length))


@method(family="policy-gradient", card="046")
def dapo(low: float = 0.2, high: float = 0.28) -> Method:
    r"""DAPO: GRPO with a higher upper clip, a mean over all tokens, no KL, and only undecided groups.

    .. math:: L = -\frac{1}{\sum_i T_i}\sum_i\sum_t
              \min(\rho_t A_i, \mathrm{clip}(\rho_t, 1-\epsilon_l, 1+\epsilon_h) A_i)

    Groups whose rewards are all equal are sampled again (at most four rounds a step); completions cut off by the length
    limit carry no gradient, but count in the mean. The soft overlong penalty is a reward: add `overlong` to the
    task's rewards.

    Args:
        low, high: the clip range.

    Reference: DAPO, 2025, arXiv 2503.14476 (card 046).
    """
    return grpo().replace(masks=(Clip(low, high), DropTruncated()), aggregate=TokenMean(), sampler=Undecided)


@method(family="policy-gradient", card="046")
def gspo(low: float = 3e-4, high: float = 4e-4, beta: float = 0.0) -> Method:
    r"""GSPO: the ratio, and its clipping, of whole sequences.

    .. math:: s_i = \Big(\prod_t \rho_{it}\Big)^{1/T_i},\qquad
              L = -\frac1\#\sum_i \min(s_i A_i, \mathrm{clip}(s_i, 1-\epsilon_l, 1+\epsilon_h) A_i)

    Args:
        low, high: the clip range, far narrower than a token ratio's. beta: KL weight.

    Reference: Group sequence policy optimization, 2025, arXiv 2507.18071 (card 046).
    """
    return grpo(beta=beta).replace(denominator=OldPolicySequence(), masks=(Clip(low, high),))


@method(family="policy-gradient", card="046")
def cispo(high: float = 5.0) -> Method:
    r"""CISPO: the ratio is truncated as a constant weight, so that no token ever loses its gradient.

    .. math:: L = -\frac{1}{\sum_i T_i}\sum_i\sum_t \mathrm{sg}[\min(\rho_t, h)]\,A_i\,\log\pi_\theta(y_{it})

    Args:
        high: h, the largest weight (an absolute bound on ρ, as in TRL; verl writes it 1 + ε).

    Reference: MiniMax-M1, 2025, arXiv 2506.13585 (card 046).
    """
    return grpo().replace(denominator=ClippedWeight(high), masks=(), aggregate=TokenMean())


@method(family="policy-gradient", card="046")
def rloo(clip: float = 0.2, kl: float = 0.0) -> Method:
    r"""REINFORCE leave-one-out: the baseline of a completion is the mean reward of the others in its group.

    .. math:: L = -\frac1\#\sum_i \min(\rho_i A_i,\ \mathrm{clip}(\rho_i, 1\mp\epsilon) A_i),\qquad
              A_i = R_i - \frac{1}{G-1}\sum_{j\ne i} R_j,\qquad
              R_i = r_i - \beta\sum_t(\log\pi_{old}-\log\pi_{ref})_{it}

    :math:`\rho_i=\prod_t\rho_{it}`: the completion is one action. With one update a step ρ = 1 and the gradient is
    that of :math:`-\frac1\#\sum_i A_i\sum_t\log\pi_\theta`.

    Args:
        clip: ε on completion ratios. kl: β of the penalty in the reward (0: no reference model is kept).

    Reference: Back to basics, 2024, arXiv 2402.14740 (card 046).
    """
    return grpo(clip).replace(advantage=LeaveOneOut(kl), denominator=OldPolicyCompletion())


@method(family="policy-gradient", card="046", name="reinforce++")
def reinforce_plus_plus(clip: float = 0.2, kl: float = 0.01, baseline: str = "none") -> Method:
    r"""REINFORCE++: no critic, no group statistics; advantages whitened over the whole step.

    .. math:: A_t = \mathrm{whiten}\Big(R - \beta\sum_{s\ge t}(\log\pi_{old}-\log\pi_{ref})_s\Big)

    with PPO's clipping and a mean over all tokens.

    Args:
        clip: ε. kl: β of the penalty to go. baseline: `group` subtracts the group's mean first (REINFORCE++-baseline).

    Reference: REINFORCE++, 2025, arXiv 2501.03262 (card 046).
    """
    if baseline not in ("none", "group"):
        raise ValueError(f"baseline is {baseline!r}; expected none or group")
    return grpo(clip).replace(
        advantage=WhitenedReturn(kl, baseline),  # type: ignore[arg-type]
        aggregate=TokenMean(),
    )


@method(family="policy-gradient")
def gdpo(clip: float = 0.2, beta: float = 0.0, weights: dict[str, float] | None = None) -> Method:
    r"""GDPO: with several rewards, normalise each within its group before adding them, then once over the step.

    .. math:: A_i = \mathrm{norm}_{step}\Big(\sum_k w_k \frac{R^k_i - \bar R^k}{\sigma_{R^k} + \epsilon}\Big)

    Args:
        clip: ε. beta: KL weight. weights: w by reward component (default 1 each).

    Reference: Group reward-decoupled normalization policy optimization, 2026, arXiv 2601.05242.
    """
    return grpo(clip, beta).replace(advantage=DecoupledGroupNormalised(tuple((weights or {}).items())))
