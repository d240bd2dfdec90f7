"""Learning without labels, or from one another: majority votes, swarms.

Notation as in `policy_gradient.py`.
"""

from __future__ import annotations

from typing import Literal

from posttrain.methods.policy_gradient import grpo
from posttrain.methods.registry import method
from posttrain.objective.advantage import GroupNormalised
from posttrain.objective.aggregate import TokenMean
from posttrain.objective.mask import Clip, Plausible
from posttrain.reward.shapings.majority import MajorityVote
from posttrain.rollout.strategies.swarm import Pick, Shared
from posttrain.training.method import Method


@method(family="self-training", card="019")
def mm_upt(
    answer: Literal["marked", "text"] = "marked",
    guard: bool = True,
    low: float = 0.2,
    high: float = 0.3,
    beta: float = 0.01,
) -> Method:
    r"""MM-UPT: GRPO without labels; the majority answer of a group is the right one.

    .. math:: R_i = 1\big[a_i \equiv \arg\max_a \#\{j : a_j = a\}\big],\qquad
              A_i = \frac{R_i - \bar R}{\sigma_R + 10^{-6}}

    .. math:: L = -\frac{1}{\sum_i T_i}\sum_i\sum_t
              \min(\rho_t A_i, \mathrm{clip}(\rho_t, 1-\epsilon_l, 1+\epsilon_h) A_i) + \beta\,\mathrm{KL}_{k3}

    Answers vote as texts (the first seen of equals wins) and are graded as mathematics. A unanimous group teaches
    nothing; where the majority is wrong, it is what is learned. The task's own reward is only reported, as
    `label_reward` and `vote_accuracy`.

    Args:
        answer: what a completion answers: what it `marked` (a box, a tag, "Answer:"), or its whole `text` where nothing
            is marked.
        guard: completions without an answer do not vote (the released code lets them vote for "None" together).
        low, high: the clip range, that of the framework the paper's code uses. beta: KL weight.

    The paper's prompts are images with questions; this is its objective on text. The questions that the model writes
    itself are `rollout.questions.write_questions`. Group 10, temperature 0.7 and top-p 0.99 are the paper's.

    Reference: Unsupervised Post-Training for Multi-Modal LLM Reasoning via GRPO, 2025, arXiv 2505.22453 (card 019).
    """
    return (
        grpo(beta=beta)
        .replace(
            advantage=GroupNormalised(eps=1e-6),
            masks=(Clip(low, high),),
            aggregate=TokenMean(),
            shaping=(MajorityVote(answer, guard),),
        )
        .with_settings(group=10, temperature=0.7, top_p=0.99)
    )


@method(family="self-training", card="053")
def sapo(
    own: int = 4,
    foreign: int = 4,
    pick: Pick = "uniform",
    floor: float = 0.0,
    low: float = 0.2,
    high: float = 0.28,
) -> Method:
    r"""SAPO (swarm sampling): each node of a swarm trains on its own rollouts and on other nodes', shared as text.

    .. math:: T_n = I \text{ own groups} \cup J \text{ foreign groups},\qquad
              L = -\frac{1}{\sum_i T_i}\sum_i\sum_t
              \min(\rho_t A_i, \mathrm{clip}(\rho_t, 1-\epsilon_l, 1+\epsilon_h) A_i),\qquad
              A_i = \frac{R_i - \bar R}{\sigma_R + 10^{-4}}

    :math:`\rho_t = \pi_\theta/\pi_{old}` with the node's own policy before the update as π_old, for foreign text as
    well: ρ starts at 1, a deliberate bias. Rewards are the node's own. Foreign groups without a difference in reward
    are discarded. `posttrain.training.swarm.swarm` trains the nodes; alone, a node finds no foreign group, and fills
    its places with its own.

    Args:
        own: I, foreign: J, groups a round; a node draws `batch` (I + J) groups in any case and shares them all.
        pick: foreign groups `uniform` at random, or the `best`, by total reward.
        floor: foreign tokens to which the policy gives less than this are masked (0: none; 1e-6 keeps negative
            advantages on implausible text from growing without bound).
        low, high: the clip range.

    A node sees what others published in rounds before its own, so the order of nodes does not matter. The learning rate
    is not established; this is the library's.

    Reference: Sharing is Caring: Efficient LM Post-Training with Collective RL Experience Sharing, 2025, arXiv
    2509.08721 (card 053).
    """
    masks = (Clip(low, high), Plausible(floor)) if floor else (Clip(low, high),)
    return (
        grpo()
        .replace(rollouts=Shared(own, foreign, pick), masks=masks, aggregate=TokenMean())
        .with_settings(batch=own + foreign)
    )
