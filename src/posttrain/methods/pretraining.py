"""Reinforcement before post-training proper: thinking about the tokens of ordinary text.

Notation: x a document, c a thought before its token :math:`x_t`, G thoughts a place, ρ the token ratio π_θ/π_old.
"""

from __future__ import annotations

from typing import Literal

from posttrain.methods.policy_gradient import ONLINE, grpo
from posttrain.methods.registry import method
from posttrain.objective.advantage import Demonstration, GroupNormalised, LeaveOneOut
from posttrain.objective.aggregate import SequenceMean
from posttrain.objective.denominator import OldPolicy
from posttrain.objective.estimator import Objective
from posttrain.objective.mask import Clip
from posttrain.objective.mixture import Mixture, Term
from posttrain.rollout.strategies.budgeted_thought import Budget, Curriculum, ThinkWithinBudget
from posttrain.rollout.strategies.thought import ThinkBeforeNext
from posttrain.training.method import Method


@method(family="pretraining", card="050")
def rlp(
    open: str = "<think>",
    close: str = "</think>",
    decay: float = 0.999,
    low: float = 0.2,
    high: float = 0.28,
    beta: float = 0.0,
    within: Literal["document", "solution"] = "document",
    least: int = 1,
) -> Method:
    r"""Reinforcement as a pre-training objective: a thought is worth how much likelier it makes the next token.

    .. math:: r(c) = \log p_\theta(x_t\mid x_{<t}, c) - \log\bar p_\phi(x_t\mid x_{<t}),\qquad
              A_i = \tfrac{G}{G-1}(r_i - \bar r)

    .. math:: L = -\frac1\#\sum_i\frac{1}{|c_i|}\sum_u
              \min(\rho_{iu}A_i, \mathrm{clip}(\rho_{iu}, 1-\epsilon_l, 1+\epsilon_h)A_i) + \beta\,\mathrm{KL}_{k3}

    φ follows θ, :math:`\phi \leftarrow \tau\phi + (1-\tau)\theta`, and predicts without a thought. Documents are a
    task's problems with their worked solutions; no verifier is asked. Only the thought's tokens learn.

    Args:
        open, close: text around a thought. decay: τ. low, high: the clip range. beta: weight of the KL to φ.
        within: where the thought-about token may stand. least: tokens before it, at least.

    Settled here: one place a document and step, drawn uniformly; ε 0.2 and 0.28; the marker that closes a thought is
    its last token, and is added where the length limit cut the thought off. The paper takes G = 16, temperature 0.7
    and thoughts of 2,048 tokens.
    Reference: RLP: Reinforcement as a Pretraining Objective, 2025, arXiv 2510.01265 (card 050).
    """
    parts = grpo(beta=beta).replace(advantage=LeaveOneOut(), masks=(Clip(low, high),))
    return parts.replace(
        settings=ONLINE, rollouts=ThinkBeforeNext(open, close, within, least), reference_decay=decay
    ).with_settings(temperature=0.7, group=16)


@method(family="pretraining", card="064")
def rmt(
    open: str = "<think>",
    close: str = "</think>",
    instruction: str = "Think in {budget} tokens.",
    start: int = 800,
    decay: float = 0.2,
    floor: int = 1,
    curriculum: bool = True,
    weight: float = 0.2,
    imitation: float = 0.1,
    chosen: int = 1,
) -> Method:
    r"""Reinforcement mid-training: think before hard tokens, ever more briefly, and imitate all the others.

    .. math:: r = (1-w)\,1[\hat y = y_i] + w\,\mathrm{tri}(\ell/B_t),\qquad B_t = \max(B_{min},
              \lfloor B_0\gamma^{t/T}\rfloor),\qquad L = L_{GRPO}(\text{chosen}) + \lambda L_{NTP}(\text{the rest})

    tri rises from 0 to 1 at the budget and falls to 0 at twice it. Chosen tokens are mostly easy ones at first (low
    entropy under the stage's first policy) and mostly hard ones at the end. Without curriculum, w = 0 and λ = 0 it is
    reinforcement pre-training (RPT).

    Args:
        open, close: text around a thought. instruction: text before it; {budget} stands for :math:`B_t`, in tokens.
        start, decay, floor: B_0, γ, B_min. curriculum: over entropy tiers, else uniform. weight: w. imitation: λ.
        chosen: tokens of each document and step that are thought about.

    Settled here: tiers part at the terciles of the first step's documents; shares (.7, .2, .1) until 30 % of the stage,
    (.1, .3, .6) from 70 %; w 0.2; tokens are chosen in solutions only.
    Reference: Reinforcement Mid-Training, 2025, arXiv 2509.24375 (card 064).
    """
    strategy = ThinkWithinBudget(
        open, close, instruction, Budget(start, decay, floor), Curriculum() if curriculum else None, weight, chosen
    )
    thoughts = Objective(GroupNormalised(), OldPolicy(), (Clip(),), SequenceMean())
    mixture = Mixture((Term(thoughts, ("policy",)), Term(Objective(Demonstration()), ("expert",), imitation)))
    return Method("rmt", mixture, "prompts", ONLINE, rollouts=strategy)
