"""Learning from rewards by a risk measure in the place of their mean. Notation as in policy_gradient.py."""

from __future__ import annotations

from posttrain.methods.policy_gradient import grpo
from posttrain.methods.registry import method
from posttrain.objective.aggregate import TokenMean
from posttrain.objective.risk import MixedValueAtRisk, Mode, Sharing, Tail
from posttrain.training.method import Method


@method(family="policy-gradient", card="030")
def riskpo(
    alpha: float = 0.2,
    beta: float = 0.8,
    weight: float = 1.5,
    bundle: int = 5,
    rate: float = 0.1,
    mode: Mode = "track",
    sharing: Sharing = "sum-mean",
    natural_baseline: bool = False,
    tail: Tail = "lower",
    clip: float = 0.2,
) -> Method:
    r"""RiskPO: a mixed value-at-risk of bundled rewards in place of their mean, so that hard prompts keep their say.

    .. math:: J = \frac{w\,\mathrm{CVaR}_\alpha(S) + \mathrm{RVaR}_{\alpha,\beta}(S)}{w + 1},\qquad
              A = \frac{1}{w+1}\Big(-\frac{w\,(q_\alpha - S)^+}{\alpha}
              + \frac{(S - q_\alpha)^+ - (S - q_\beta)^+ + c}{\beta - \alpha}\Big)

    S is the score of a *paper*: the summed rewards of the j-th completions of a bundle's prompts. Weight lies on the
    scores' lower tail (CVaR, below the quantile :math:`q_\alpha`) and middle (range value-at-risk) and none on their
    top, so that prompts which are solved already stop pulling. A, over the spread of the bundle's scores, is handed
    back to the completions; the rest is PPO's clipping with a mean over all tokens, without KL and entropy terms.

    Consecutive prompts of a step form a bundle: take a `batch` that `bundle` divides (the default is two bundles; what
    is left over forms a smaller bundle, judged by its own quantiles). A bundle without variance divides by 1, and
    shares of a paper are at most 5 either way: both would be unbounded by the formula.

    Args:
        alpha, beta: levels of the quantiles; 0.2 and 0.9 for tasks that are easy for the model.
        weight: w of the lower tail. bundle: prompts a bundle. rate: of the quantiles' tracking.
        mode: quantiles `track`ed over the steps, of the `batch`'s bundle alone (what the authors' code does), or `mix`.
        sharing: how completions share a paper's advantage: `sum-mean` (hard tasks), `std` (easy ones), `uniform`,
            `score`; see `MixedValueAtRisk`.
        natural_baseline: c is :math:`q_\alpha - q_\beta` (easy tasks) in the place of 0.
        tail: `upper` is the risk-seeking contrast. clip: ε.

    Reference: RiskPO: Risk-based Policy Optimization via Verifiable Reward for LLM Post-Training, 2025,
    arXiv 2510.00911 (card 030).
    """
    risk = MixedValueAtRisk(alpha, beta, weight, bundle, rate, mode, sharing, natural_baseline, tail)
    return grpo(clip).replace(advantage=risk, aggregate=TokenMean()).with_settings(batch=2 * bundle)
