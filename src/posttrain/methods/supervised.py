"""Learning from demonstrations: SFT and its reweightings."""

from __future__ import annotations

from posttrain.methods.registry import method
from posttrain.objective.advantage import Demonstration
from posttrain.objective.denominator import One
from posttrain.objective.estimator import Objective
from posttrain.training.method import Method
from posttrain.training.settings import Settings


@method(family="sft-objective", card="044")
def sft() -> Method:
    r"""Supervised fine-tuning: imitate the assistant's tokens.

    .. math:: L = -\frac{1}{N}\sum_t \log\pi_\theta(y_t \mid x, y_{<t})

    N counts the assistant tokens of the whole step, so every token weighs the same under gradient accumulation.

    Reference: as in Tülu 3, 2024, arXiv 2411.15124 (card 044). The estimator: ratio 1 (the denominator is the policy
    itself) and advantage 1.
    """
    settings = Settings(epochs=1, batch=16, learning_rate=1e-4)
    return Method("sft", Objective(Demonstration()), "demonstrations", settings)


@method(family="sft-objective", card="051")
def dft() -> Method:
    r"""Dynamic fine-tuning: each token's loss is weighted with the probability the policy gives it.

    .. math:: L = -\frac{1}{N}\sum_t \mathrm{sg}[\pi_\theta(y_t)]\,\log\pi_\theta(y_t \mid x, y_{<t})

    The gradient is that of :math:`-\frac1N\sum_t \pi_\theta(y_t)`: the factor 1/π hidden in SFT's gradient is gone, so
    tokens that the model finds implausible (often noise) pull less. New knowledge is learned more slowly.

    Reference: Dynamic Fine-Tuning, 2025, arXiv 2508.05629; analysed in ASFT, arXiv 2509.23753 (card 051).
    """
    return sft().replace(denominator=One())
