r"""Learning from preferences: DPO and its published variants, each a loss of the pair.

Notation: r_c, r_r log-ratios :math:`\log\pi_\theta/\pi_{ref}` summed over the chosen and the rejected answer,
m = r_c − r_r the margin, a bar the mean over an answer's tokens instead of the sum, s the log-probability under the
policy alone.
"""

from __future__ import annotations

from posttrain.methods.registry import method
from posttrain.objective import pairs
from posttrain.objective.aggregate import GroupMean, SequenceSum
from posttrain.objective.estimator import Objective
from posttrain.training.method import Method
from posttrain.training.settings import Settings

OFFLINE = Settings(epochs=1, batch=8, learning_rate=5e-6, warmup=0.1)


def _preference(loss: pairs.PairLoss, *, reference: bool = True) -> Method:
    objective = Objective(pairs.Preference(loss, reference), aggregate=GroupMean())
    return Method("preference", objective, "preferences", OFFLINE)


@method(family="preference")
def dpo(beta: float = 0.1, label_smoothing: float = 0.0) -> Method:
    r"""Direct preference optimisation.

    .. math:: L = -(1-\epsilon)\log\sigma(\beta m) - \epsilon\log\sigma(-\beta m)

    Args:
        beta: strength of the pull to the reference. label_smoothing: ε, the share of labels believed wrong (cDPO).

    Reference: Direct preference optimization, 2023, arXiv 2305.18290; the smoothing: Mitchell, A note on DPO with noisy
    preferences, 2023.
    """
    return _preference(pairs.Sigmoid(beta, label_smoothing))


@method(family="preference")
def ipo(beta: float = 0.1) -> Method:
    r"""IPO: regress the margin to a fixed size instead of pushing it to infinity.

    .. math:: L = \Big(\bar m - \frac{1}{2\beta}\Big)^2

    The margin is of means over tokens: the authors' confirmed reading, which peers use too.

    Args:
        beta: τ of the paper. Reference: A general theoretical paradigm, 2023, arXiv 2310.12036.
    """
    return _preference(pairs.IPO(beta))


@method(family="preference")
def hinge_dpo(beta: float = 0.1) -> Method:
    r"""DPO with the hinge loss of SLiC.

    .. math:: L = \max(0, 1 - \beta m)

    Args:
        beta: scale of the margin. Reference: SLiC-HF, 2023, arXiv 2305.10425 (as normalised in RSO, arXiv 2309.06657).
    """
    return _preference(pairs.Hinge(beta))


@method(family="preference")
def robust_dpo(beta: float = 0.1, label_smoothing: float = 0.1) -> Method:
    r"""Robust DPO: an unbiased estimate of DPO's loss when a known share of the labels is flipped.

    .. math:: L = \frac{-(1-\epsilon)\log\sigma(\beta m) + \epsilon\log\sigma(-\beta m)}{1 - 2\epsilon}

    Args:
        beta: as in DPO. label_smoothing: ε < 1/2, the share flipped.

    Reference: Provably robust DPO, 2024, arXiv 2403.00409.
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}; expected a share in [0, 0.5)")
    return _preference(pairs.Robust(beta, label_smoothing))


@method(family="preference", card="044")
def dpo_norm(beta: float = 5.0) -> Method:
    r"""Length-normalised DPO, as in Tülu 3: margins of means over tokens, so that length earns nothing.

    .. math:: L = -\log\sigma(\beta\,\bar m)

    Args:
        beta: 5, larger than DPO's since a mean is smaller than a sum.

    Reference: Tülu 3, 2024, arXiv 2411.15124 (card 044).
    """
    return _preference(pairs.LengthNormalised(beta))


@method(family="preference", branch="2.3u")
def simpo(beta: float = 2.0, gamma: float = 0.5, label_smoothing: float = 0.0) -> Method:
    r"""SimPO: the mean log-probability itself is the reward; a target margin, and no reference model.

    .. math:: L = -\log\sigma(\beta(\bar s_c - \bar s_r) - \gamma)

    Args:
        beta: scale. gamma: the margin. label_smoothing: share of labels believed wrong.

    Reference: SimPO, 2024, arXiv 2405.14734.
    """
    return _preference(pairs.SimPO(beta, gamma, label_smoothing), reference=False)


@method(family="preference", branch="2.3u")
def orpo(beta: float = 0.1) -> Method:
    r"""ORPO: SFT on the chosen answer with an odds-ratio penalty on the rejected one; no reference model.

    .. math:: L = -\bar s_c - \beta\log\sigma\Big(\log\frac{odds_c}{odds_r}\Big)

    with :math:`odds = e^{\bar s} / (1-e^{\bar s})`.

    Args:
        beta: λ of the paper. The SFT term is the mean over the chosen answer's tokens (the prompt carries no loss).

    Reference: ORPO, 2024, arXiv 2403.07691.
    """
    return _preference(pairs.OddsRatio(beta), reference=False)


@method(family="preference")
def apo_zero(beta: float = 0.1) -> Method:
    r"""APO-zero: anchored at the reference, chosen answers go up and rejected ones down.

    .. math:: L = 1 - \sigma(\beta r_c) + \sigma(\beta r_r)

    For data whose chosen answers are better than the model's own.

    Args:
        beta: scale. Reference: Anchored preference optimization, 2024, arXiv 2408.06266.
    """
    return _preference(pairs.APOZero(beta))


@method(family="preference")
def apo_down(beta: float = 0.1) -> Method:
    r"""APO-down: both answers go down, the rejected one more.

    .. math:: L = \sigma(\beta r_c) + 1 - \sigma(\beta(r_c - r_r))

    For data whose chosen answers are worse than the model's own.

    Args:
        beta: scale. Reference: Anchored preference optimization, 2024, arXiv 2408.06266.
    """
    return _preference(pairs.APODown(beta))


@method(family="preference", branch="2.3u")
def kto(beta: float = 0.1, desirable: float = 1.0, undesirable: float = 1.0) -> Method:
    r"""KTO: single answers marked desirable or not, judged against the policy's divergence from the reference.

    .. math:: L = w_d(1-\sigma(\beta(r - z_0)))\ \text{or}\ w_u(1-\sigma(\beta(z_0 - r)))

    z_0 = max(0, mean log-ratio of answers put behind another row's prompt), over the step, without gradient.

    Args:
        beta: scale. desirable, undesirable: weights; keep weight x count of the two kinds within a factor of 4/3.

    Reference: KTO, 2024, arXiv 2402.01306.
    """
    objective = Objective(pairs.KTO(beta, desirable, undesirable), aggregate=SequenceSum())
    return Method("kto", objective, "feedback", OFFLINE)
