r"""Learning over several turns of an environment: PPO with turns as the unit, and its stabilised forms.

Notation: trajectory y of turns k = 1..K, the policy's tokens :math:`y^k` in each; what the environment says carries no
gradient. :math:`w_t = \pi_\theta/\pi_{old}` of a token, Â_t its advantage by GAE over the policy's own tokens.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from posttrain.methods.policy_gradient import ONLINE
from posttrain.methods.registry import method
from posttrain.objective.advantage import GAE
from posttrain.objective.aggregate import SequenceMean
from posttrain.objective.denominator import OldPolicy
from posttrain.objective.divergence import CriticLoss
from posttrain.objective.estimator import Objective
from posttrain.objective.mask import Clip
from posttrain.objective.turns import OldPolicyTurn
from posttrain.training.method import Method
from posttrain.training.normaliser import ClippingBias

Safeguard = Literal["threshold", "triggered"]
STALE = replace(ONLINE, updates=4, minibatches=2)


@method(family="agents", card="162")
def turn_ppo(clip: float = 0.2, gamma: float = 1.0, lam: float = 1.0, value: float = 0.1) -> Method:
    r"""Turn-PPO: one importance ratio a turn, the unit in which the environment answers.

    .. math:: L = -\frac1\#\sum_y\frac{1}{|y|}\sum_k\sum_{t\in k}
              \min\big(w^k \hat A_t,\ \mathrm{clip}(w^k, 1\mp\epsilon)\hat A_t\big),\qquad
              w^k = \Big(\prod_{t\in k} w_t\Big)^{1/|y^k|}

    With one turn it is PPO with GSPO's sequence ratio; with turns of one token it is PPO.

    Args:
        clip: ε. gamma, lam: of GAE, the outcome at the last token. value: weight of the critic's loss.

    Settled here: γ = λ = 1, four passes of two minibatches, the linear critic of `ppo`.
    Reference: ST-PPO: Stabilized Off-Policy Proximal Policy Optimization for Multi-Turn Agents Training, 2025, arXiv
    2511.20718 (card 162).
    """
    parts = Objective(
        GAE(gamma, lam, kl=0.0), OldPolicyTurn(), (Clip(clip, clip),), SequenceMean(), (CriticLoss(value),)
    )
    return Method("turn-ppo", parts, "prompts", STALE, critic=True)


@method(family="agents", card="162")
def s_ppo(
    clip: float = 0.2,
    gamma: float = 1.0,
    lam: float = 1.0,
    value: float = 0.1,
    threshold: float = 1.0,
    safeguard: Safeguard = "threshold",
) -> Method:
    r"""S-PPO: token PPO whose gradient is divided by the size of what clipping took out of it.

    .. math:: g = \frac{\nabla J_{PPO}}{\max(1, \|C\|/c_0)},\qquad
              C = \frac1\#\sum_y\frac{1}{|y|}\sum_t 1[t\ \text{clipped}]\,w_t\hat A_t\,\nabla\log\pi_\theta(y_t)

    Clipped tokens are those whose advantage is trusted least; where they weigh much, the step is shortened.

    Args:
        clip, gamma, lam, value: as in `turn_ppo`. threshold: c0, the norm up to which nothing changes.
        safeguard: `threshold` as above; `triggered` divides by max(norm, 0.001) wherever a token is clipped.

    The paper divides by the norm itself and leaves its limit at 0 open; the safeguard is this library's. Adam cancels a
    division that stays the same from step to step: only its changes matter. The norm is over the whole minibatch.
    Reference: ST-PPO: Stabilized Off-Policy Proximal Policy Optimization for Multi-Turn Agents Training, 2025, arXiv
    2511.20718 (card 162).
    """
    token = turn_ppo(clip, gamma, lam, value).replace(denominator=OldPolicy())
    return token.replace(normaliser=ClippingBias(threshold, safeguard))


@method(family="agents", card="162")
def st_ppo(
    clip: float = 0.2,
    gamma: float = 1.0,
    lam: float = 1.0,
    value: float = 0.1,
    threshold: float = 1.0,
    safeguard: Safeguard = "threshold",
) -> Method:
    r"""ST-PPO: turn-level ratios and the division by the clipping bias together.

    .. math:: g = \frac{\nabla J_{Turn-PPO}}{\max(1, \|C\|/c_0)},\qquad
              C = \frac1\#\sum_y\frac{1}{|y|}\sum_k \sum_{t\in k} 1[t\ \text{clipped}]\,\hat A_t\,\nabla w^k

    Args:
        clip, gamma, lam, value: as in `turn_ppo`. threshold, safeguard: as in `s_ppo`.

    Reference: ST-PPO: Stabilized Off-Policy Proximal Policy Optimization for Multi-Turn Agents Training, 2025, arXiv
    2511.20718 (card 162).
    """
    return turn_ppo(clip, gamma, lam, value).replace(normaliser=ClippingBias(threshold, safeguard))
