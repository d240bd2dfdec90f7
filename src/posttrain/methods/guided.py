"""Reinforcement learning with help in the rollout: a demonstration's first steps, a teacher's feedback.

Notation as in `policy_gradient.py`: R_i the reward of completion i of a group of N, ρ_t the token ratio π_θ/π_old.
"""

from __future__ import annotations

from pathlib import Path

from posttrain.methods.policy_gradient import dr_grpo, grpo
from posttrain.methods.registry import method
from posttrain.models.causal import CausalPolicy
from posttrain.objective.advantage import GroupNormalised
from posttrain.objective.advantage_shaped import AdvantageShaped, LearnRareAvoidLikely, Shape
from posttrain.objective.aggregate import TokenMean
from posttrain.objective.divergence import EntropyBonus
from posttrain.objective.mask import Clip, DualClip
from posttrain.objective.off_policy import BySource
from posttrain.objective.schedule import Cosine
from posttrain.objective.uncertain import MostUncertain
from posttrain.rollout.strategies.feedback import FEEDBACK, Author, Feedback, Prompted
from posttrain.rollout.strategies.prefix import DemonstrationPrefix
from posttrain.training.method import Method


@method(family="hybrid", card="035", name="prefix-rft")
def prefix_rft(
    start: float = 0.95,
    end: float = 0.05,
    high: float = 0.95,
    keep: float = 0.2,
    clip: float = 0.2,
    dual_clip: float = 3.0,
    entropy: float = 0.001,
    length: int = 128,
    room: int = 1,
) -> Method:
    r"""Prefix-RFT: one completion of a group continues a demonstration, whose tokens are credited by how it ends.

    .. math:: o_N = [\,y^*_{<L}, o \sim \pi_{old}(\cdot\mid x, y^*_{<L})\,],\quad
              L = \lfloor \ell\,|y^*|\rfloor,\quad \ell \sim U(\mathrm{low}(s), \mathrm{high}),\qquad
              A_i = R_i - \bar R

    .. math:: \ell_t = \max(-\rho_t A, -\mathrm{clip}(\rho_t, 1\mp\epsilon) A),\quad
              \min(\ell_t, -cA) \text{ where } A < 0,\qquad
              L = \frac{1}{\#\,L_{max}}\sum_i\sum_t \ell_{it} - \beta_H H

    A is one number for prefix and continuation, relative to the whole group: where the demonstration's beginning leads
    to a better end than the policy's own, it is imitated; where it fails, the prefix is pushed away too. Of a step's
    prefix tokens only the most uncertain keep their advantage. π_old of prefix tokens is the policy itself.

    Args:
        start, end: low(s), a cosine over the stage's steps; the share given shrinks. high: the largest share. Equal
            numbers for all three give a constant share.
        keep: share of the prefix tokens with the highest entropy that is trained on (1: all).
        clip: ε. dual_clip: c. entropy: β_H, of a bonus on all tokens. length: L_max in tokens, a constant (set it to
            `max_tokens`).
        room: tokens of `max_tokens` that stay for the continuation; raise it where demonstrations are long.

    The advantage is the pooled one of the released code's three variants. The entropies are taken over the whole step
    under π_old, as the paper's algorithm has it (its code: over each micro-batch). The loss is a mean over sequences
    (its code sums over those of a micro-batch, which only scales the learning rate). The demonstration's end token is
    neither given nor counted. The task must have worked solutions.

    Reference: Blending Supervised and Reinforcement Fine-Tuning with Prefix Sampling, 2025, arXiv 2507.01679 (card
    035).
    """
    advantage = GroupNormalised("none")
    return dr_grpo(clip, length=length).replace(
        rollouts=DemonstrationPrefix(Cosine(start, end), high, room),
        advantage=MostUncertain(advantage, keep) if keep < 1 else advantage,
        masks=(Clip(clip, clip), DualClip(dual_clip)),
        divergences=(EntropyBonus(entropy),) if entropy else (),
    )


@method(family="hybrid", card="085")
def thinktuning(
    share: float = 0.25,
    teacher: str | Path | CausalPolicy | None = None,
    template: str = FEEDBACK,
    author: Author | None = None,
    c: float = 0.1,
    shape: Shape | None = None,
    clip: float = 0.2,
    beta: float = 0.0,
) -> Method:
    r"""ThinkTuning: a teacher of the policy's own size appends feedback to some attempts; its words are shaped in.

    .. math:: \tilde o_i = [o_i \oplus f_i],\quad f_i \sim \text{teacher}(\cdot\mid x, o_i),\qquad
              A_i = \frac{R_i - \bar R}{\sigma_R + 10^{-4}}

    .. math:: L = -\frac{1}{\sum_i |\tilde o_i|}\sum_i\Big(\sum_{t\in o_i}\min(\rho_t A_i, \mathrm{clip}(\rho_t) A_i)
              + \sum_{t\in f_i} w(\pi_\theta(f_t), A_i)\,A_i\Big)

    R is the reward of the whole text, attempt and feedback, so the verifier must look at the last answer. Feedback that
    leads to the right answer has a positive advantage, and the policy learns to reflect without being asked.

    Args:
        share: γ, the share of a group that goes on with feedback, rounded up.
        teacher: the model that writes it, by id, folder or loaded; None prompts the stage's first policy.
        template: what the teacher is asked, with places for {question}, {attempt}, {verdict} ("right" or "wrong") and
            {answer}; may hold worked examples. The default one tells the verdict and not the answer, which the policy
            would learn to wait for.
        author: writes the feedback in the place of a prompted model (see `rollout.strategies.feedback.Author`).
        c: of the default shape. shape: w, a differentiable function of probability and advantage, elementwise.
        clip: ε. beta: weight of the KL (k3) to the stage's first policy.

    Not established by the paper, and settled here: γ, c, no KL, and the shape ("advantage-aware"), which stands in for
    the paper's: w = p/(p + c) for A > 0, which learns rare tokens, and w = p for A <= 0, which leaves alone what the
    policy would not say anyway. Evaluate with plain prompts. The mean is over all tokens of the step.

    Reference: ThinkTuning: Instilling Cognitive Reflections without Distillation, 2025, arXiv 2508.07616 (card 085).
    """
    writer = Prompted(template, reference=teacher is None) if author is None else author
    return grpo(clip, beta).replace(
        rollouts=Feedback(share, writer),
        denominator=BySource(others=AdvantageShaped(LearnRareAvoidLikely(c) if shape is None else shape)),
        aggregate=TokenMean(),
        teacher=teacher,
    )
