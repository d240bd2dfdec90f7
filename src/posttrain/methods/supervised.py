"""Learning from demonstrations, others' or the policy's own successes: SFT and its reweightings."""

from __future__ import annotations

from typing import Literal, get_args

from posttrain.methods.policy_gradient import ONLINE
from posttrain.methods.registry import method
from posttrain.objective.advantage import Demonstration
from posttrain.objective.denominator import One
from posttrain.objective.divergence import FullKL
from posttrain.objective.estimator import Objective
from posttrain.objective.imitation import Accepted
from posttrain.training.method import Method
from posttrain.training.settings import Settings
from posttrain.trajectory import PosttrainError

Direction = Literal["forward", "reverse"]


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


@method(family="sft-objective", card="051")
def asft(anchor: float = 0.1, kl: Direction = "forward", weighted: bool = True) -> Method:
    r"""Anchored SFT: DFT, held to the first policy by a KL term over the full vocabulary.

    .. math:: L = \frac{1}{N}\sum_t \Big(-\mathrm{sg}[\pi_\theta(y_t)]\,\log\pi_\theta(y_t)
              + \lambda\,\mathrm{KL}(\pi_0(\cdot)\,\|\,\pi_\theta(\cdot))_t\Big)

    DFT is the tighter bound on the reward of the demonstrations, but moves with the policy: nothing ties it to the
    model that it started from, and it drifts. The KL is taken at every assistant token.

    Args:
        anchor: λ; 0 is DFT. kl: `forward` as above (as in the authors' code), `reverse` is KL(π_θ‖π_0).
        weighted: False leaves out the weight: SFT with the anchor (the paper's arm SFT+KL).

    Settled here: the direction, which the code shows and the text may not mean.

    Reference: Anchored Supervised Fine-Tuning, 2025, arXiv 2509.23753 (card 051).
    """
    if kl not in get_args(Direction):
        raise PosttrainError(f"asft: kl is {kl!r}; expected forward or reverse")
    made = dft() if weighted else sft()
    return made.replace(divergences=(FullKL(anchor, kl),) if anchor else ())


@method(family="self-training", card="046")
def raft(success: float = 1.0) -> Method:
    r"""Rejection sampling: imitate the policy's own right completions, and drop the others (RAFT, STaR).

    .. math:: L = -\frac{1}{N^+}\sum_{i: R_i \ge r}\sum_t \log\pi_\theta(y_{it})

    N⁺ counts the tokens of the right completions of the step. A step without one changes nothing.

    Args:
        success: r, the reward from which on a completion is imitated.

    Settled here: every completion that reaches r is imitated, as in STaR and the unified estimator's table; RAFT takes
    the best of each prompt's.

    Reference: RAFT, 2023, arXiv 2304.06767; STaR, 2022, arXiv 2203.14465 (row rejection SFT of card 046).
    """
    return Method("raft", Objective(Accepted(success)), "prompts", ONLINE)
