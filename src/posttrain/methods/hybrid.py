r"""Learning from demonstrations and rewards in one stage: CHORD, ViSurf, AHPO, HPT, LUFFY, SRFT.

Notation: y a completion of the policy's, y* the prompt's demonstration, G rollouts a prompt, R a reward, m and σ its
mean and standard deviation over a group, ρ the token ratio π_θ/π_old. Demonstrations come from the task: training
problems without a worked solution are left out.
"""

from __future__ import annotations

from typing import Literal

from posttrain.methods.policy_gradient import ONLINE
from posttrain.methods.registry import method
from posttrain.objective.advantage import Demonstration, GroupNormalised
from posttrain.objective.aggregate import ConstantLength, PromptMean, SequenceMean, TokenMean
from posttrain.objective.denominator import CurrentPolicy, OldPolicy
from posttrain.objective.divergence import EntropyBonus, ReferenceKL
from posttrain.objective.estimator import Objective
from posttrain.objective.imitation import Cutoff, EntropyWeighted, Failure, Uncertain
from posttrain.objective.mask import Clip, DualClip
from posttrain.objective.mixture import Mixture, Term
from posttrain.objective.off_policy import BySource, Probability, Shaped
from posttrain.objective.schedule import Coefficient, Complement, Cosine
from posttrain.reward.shapings.label import LabelControl
from posttrain.rollout.strategies.demonstrations import Interleaved
from posttrain.rollout.strategies.gate import Gate
from posttrain.rollout.strategies.label import Label
from posttrain.training.method import Method
from posttrain.trajectory import PosttrainError

EPS = 1e-6  # added to a group's standard deviation by the papers of this family


def _chord(mu: Coefficient, phi: bool, share: float, clip: float, dual_clip: float, cutoff: float) -> Method:
    rollouts = Objective(GroupNormalised(eps=EPS), OldPolicy(), (Clip(clip, clip), DualClip(dual_clip)), TokenMean())
    masks = (Cutoff(cutoff),) if cutoff < 1 else ()
    demonstrations = Objective(Uncertain() if phi else Demonstration(), CurrentPolicy(), masks, TokenMean())
    terms = (Term(rollouts, ("policy",), Complement(mu)), Term(demonstrations, ("expert",), mu))
    made = Method("chord", Mixture(terms), "prompts", ONLINE, rollouts=Interleaved(share))
    return made.with_settings(batch=24)  # with the usual share 8 prompts are tried, as in GRPO, and 16 demonstrated


@method(family="hybrid", card="009")
def chord(
    peak: float = 0.9,
    valley: float = 0.05,
    rise: int = 0,
    decay: int | None = 200,
    phi: bool = False,
    share: float = 0.2,
    clip: float = 0.2,
    dual_clip: float = 3.0,
    cutoff: float = 1.0,
) -> Method:
    r"""CHORD-μ: GRPO and imitation in one loss, whose balance moves from imitation to exploration.

    .. math:: L = (1-\mu)\,L_{GRPO} + \mu\,L_{SFT},\qquad
              \mu(s) = \mathrm{valley} + (\mathrm{peak}-\mathrm{valley})\,\tfrac12\big(1+\cos(\pi (s-W)/D)\big)

    Each loss is a mean over its own tokens of the step. GRPO's advantages are relative to the rollouts alone; a
    negative one costs at most `dual_clip` times its size. During the W first steps μ rises from 0 to its peak; after D
    more it stays in the valley.

    Args:
        peak, valley: of μ, both in [0, 1]; equal ones make μ constant, 0 is GRPO and 1 is SFT.
        rise, decay: W and D, in optimizer steps; decay None is the rest of the stage.
        phi: weigh demonstrated tokens with p(1-p), as in `chord-phi`.
        share: of demonstrations among the step's sequences; the prompts of a step are divided so that it comes out.
        clip: ε of the token ratio. dual_clip: the most that a ratio counts for a negative advantage.
        cutoff: demonstrated tokens more probable than this have no gradient (1: none is cut off).

    Settled here: expert and rollout prompts of a step are different ones of the same task; the paper's code counts rows
    where micro-batches are added up, here tokens are counted, so that the split changes nothing.

    Reference: On-Policy RL Meets Off-Policy Experts, 2025, arXiv 2508.11408 (card 009).
    """
    if not (0 <= valley <= 1 and 0 <= peak <= 1):
        raise PosttrainError(f"chord: peak is {peak} and valley {valley}; expected weights from 0 to 1")
    constant = peak == valley and not rise
    mu: Coefficient = valley if constant else Cosine(peak, valley, rise, decay)
    return _chord(mu, phi, share, clip, dual_clip, cutoff)


@method(family="hybrid", card="009")
def chord_phi(
    mu: float = 0.1,
    share: float = 0.2,
    clip: float = 0.2,
    dual_clip: float = 3.0,
    cutoff: float = 1.0,
) -> Method:
    r"""CHORD-φ: GRPO with a little imitation of just those demonstrated tokens that the policy is uncertain about.

    .. math:: L = (1-\mu)\,L_{GRPO} - \frac{\mu}{N^*}\sum_t \mathrm{sg}[p_t(1-p_t)]\,\log p_t,\qquad
              p_t = \pi_\theta(y^*_t \mid x, y^*_{<t})

    N* counts the demonstrated tokens of the step, not their weights: the imitation has at most a quarter of the
    strength that μ has in `chord`. Known tokens and those foreign to the policy are left alone, so its own patterns
    survive.

    Args:
        mu: μ, constant.
        share, clip, dual_clip, cutoff: as in `chord`.

    Reference: On-Policy RL Meets Off-Policy Experts, 2025, arXiv 2508.11408 (card 009).
    """
    if not 0 <= mu <= 1:
        raise PosttrainError(f"chord-phi: mu is {mu}; expected a weight from 0 to 1")
    return _chord(mu, True, share, clip, dual_clip, cutoff)


@method(family="hybrid", card="007")
def visurf(
    clip: float = 0.2,
    beta: float = 0.0,
    thinking: tuple[str, ...] = (),
    align: bool = True,
    smooth: bool = True,
    mean: Literal["sequence", "token"] = "sequence",
) -> Method:
    r"""ViSurf: the label joins its prompt's rollouts as one more sample, whose advantage vanishes once it is matched.

    .. math:: L = -\frac{1}{G+1}\Big(\sum_j m(y_j, \hat A_j) + m(y^*, \hat A_{y^*})\Big),\qquad
              m(z, A) = \frac{1}{|z|}\sum_t \min(\rho_t A,\ \mathrm{clip}(\rho_t, 1\mp\epsilon) A)

    Advantages are normalised over all G + 1 rewards. The label's ratio, too, is relative to the policy before the step
    (not 1), so that it starts at 1 and is clipped. While the policy fails, the label alone has a positive advantage.

    Args:
        clip: ε. beta: weight of the KL to the stage's first policy (k3; 0 keeps no reference).
        thinking: components of the reward that the label gets no credit for, having no reasoning to show.
        align: write the label's punctuation as the rollouts do.
        smooth: where a rollout earns as much as the label can, the label's reward is the rollouts' mean, and its
            advantage 0.
        mean: over a sequence's tokens first, which gives a short label's tokens much weight, or over all `token`s.

    Settled here, where the paper leaves it open: β = 0, ε = 0.2, σ unbiased with 1e-6 added. Alignment is of the spaces
    behind commas, colons and semicolons. The method is its objective, on text.

    Reference: ViSurf: Visual Supervised-and-Reinforcement Fine-Tuning, 2025, arXiv 2510.10606 (card 007).
    """
    if mean not in ("sequence", "token"):
        raise PosttrainError(f"visurf: mean is {mean!r}; expected sequence or token")
    objective = Objective(
        GroupNormalised(eps=EPS),
        OldPolicy(),
        (Clip(clip, clip),),
        SequenceMean() if mean == "sequence" else TokenMean(),
        (ReferenceKL(beta),) if beta else (),
    )
    control = LabelControl(tuple(thinking), smooth)
    return Method("visurf", objective, "prompts", ONLINE, rollouts=Label(align), shaping=(control,))


@method(family="hybrid", card="038")
def ahpo(
    fewer: int = 1, clip: float = 0.2, beta: float = 0.0, success: float = 1.0, component: str | None = None
) -> Method:
    r"""AHPO: GRPO, and imitation of the demonstration for just those prompts whose rollouts succeed too rarely.

    .. math:: L = \frac1B\sum_x \Big( L_{GRPO}(x) - \xi(x)\,\frac{1}{|y^*|}\sum_t \log\pi_\theta(y^*_t) \Big),\qquad
              \xi(x) = 1\big[\#\{i: R_i = 1\} < \hat R\big]

    Args:
        fewer: R̂, counted prompt by prompt; 0 is GRPO, more than the group always imitates.
        clip: ε. beta: weight of the KL to the stage's first policy (k3; 0 keeps no reference).
        success: the reward that counts as success: a graded one below it does not. component: of this component of the
            reward instead of the total.

    Settled here, where the paper leaves it open: R̂ = 1, a mean over the demonstration's tokens, β = 0. With rewards 0
    and 1 and R̂ = 1 a prompt has either term, never both. The method is its objective, on text.

    Reference: MM-HELIX, 2025, arXiv 2510.08540 (card 038).
    """
    divergences = (ReferenceKL(beta),) if beta else ()
    rollouts = Objective(GroupNormalised(eps=EPS), OldPolicy(), (Clip(clip, clip),), SequenceMean(), divergences)
    imitation = Objective(Demonstration(), aggregate=PromptMean())
    terms = (Term(rollouts, ("policy",)), Term(imitation, ("expert",)))
    gate = Gate(fewer, success=success, component=component)
    return Method("ahpo", Mixture(terms), "prompts", ONLINE, rollouts=gate)


@method(family="hybrid", card="046")
def hpt(
    gate: int = 0,
    imitation: float = 1.0,
    length: int = 128,
    entropy: float = 0.001,
    success: float = 1.0,
    component: str | None = None,
) -> Method:
    r"""HPT: imitation for the prompts that the policy (almost) never solves, on-policy learning for the others.

    .. math:: L = -\frac{1}{\#\,L_{max}}\sum_{i: k > \gamma}\sum_t \rho_{it}\,(R_i - m)
              - \frac{c}{N^*}\sum_{x: k \le \gamma}\sum_t \log\pi_\theta(y^*_t)

    k of a prompt's G rollouts succeed. Where k is at most the gate, they are dropped, and the demonstration is
    imitated; otherwise they are learned from as in Dr. GRPO, without clipping (so keep to two minibatches at most). N*
    counts the imitated tokens of the step, # the rollouts that are kept.

    Args:
        gate: γ, a number of successes; -1 is Dr. GRPO without clipping, G is SFT.
        imitation: c. Since one term is divided by a constant length and the other by its tokens, it sets their balance.
        length: L_max in tokens (set it to `max_tokens`).
        entropy: weight of an entropy bonus on the rollouts.
        success, component: what counts as success, as in `ahpo`.

    Settled here: the paper's code sums over the rollouts of a micro-batch without dividing by their number, so that the
    balance depends on the hardware; here # divides. Updates with a gradient norm above 80 are skipped, as there. Its
    middle band and soft switches are not provided.

    Reference: Towards a Unified View of Large Language Model Post-Training, 2025, arXiv 2509.04419 (card 046).
    """
    bonus = (EntropyBonus(entropy),) if entropy else ()
    rollouts = Objective(GroupNormalised("none"), OldPolicy(), (), ConstantLength(length), bonus)
    terms = (Term(rollouts, ("policy",)), Term(Objective(Demonstration()), ("expert",), imitation))
    strategy = Gate(gate + 1, instead=True, success=success, component=component)
    made = Method("hpt", Mixture(terms), "prompts", ONLINE, rollouts=strategy)
    return made.with_settings(skip_grad_norm=80.0)


@method(family="hybrid", card="046")
def luffy(gamma: float = 0.1) -> Method:
    r"""LUFFY: a demonstration among the rollouts, learned from off-policy with a shaped probability.

    .. math:: L = -\frac{1}{N}\Big(\sum_i\sum_t \rho_{it}\,\hat A_i + \sum_t f(\pi_\theta(y^*_t))\,\hat A^*\Big),\qquad
              f(\pi) = \frac{\pi}{\pi+\gamma}

    Advantages are normalised over the rollouts and the demonstration together; N counts the tokens of both. Nothing is
    clipped. The demonstration's denominator is 1; f keeps improbable tokens from having no pull.

    Args:
        gamma: γ, the probability whose tokens are learned from most.

    Settled here: as in the paper (σ divides, a mean over tokens); the authors' scripts divide neither, but every sum by
    a constant length.

    Reference: Learning to Reason under Off-Policy Guidance, 2025, arXiv 2504.14945 (row LUFFY of card 046).
    """
    if gamma <= 0:
        raise PosttrainError(f"luffy: gamma is {gamma}; expected a probability above 0")
    objective = Objective(GroupNormalised(eps=EPS), BySource(OldPolicy(), Shaped(gamma)), (), TokenMean())
    return Method("luffy", objective, "prompts", ONLINE, rollouts=Label()).with_settings(group=7)


@method(family="hybrid", card="046")
def srft(imitation: float = 0.5, exploration: float = 0.1, success: float = 1.0) -> Method:
    r"""SRFT: imitation, off-policy and on-policy learning in one step, balanced by the policy's entropy.

    .. math:: L = -\frac{1}{N^*}\sum_t \big(\pi_\theta(y^*_t)\,\hat A^* + w^* \log\pi_\theta(y^*_t)\big)
              - \frac1N\sum_i\sum_t a_i \log\pi_\theta(y_{it})

    with :math:`w^* = 0.5\,e^{-H(y^*)}`, and :math:`a_i = 0.1\,e^{H(y_i)}` for right completions, -1 for wrong ones. H
    is the mean entropy of a sequence's tokens under the policy (constant); Â* is normalised over the rollouts and the
    demonstration together; N* and N count the tokens of demonstrations and of rollouts.

    Args:
        imitation: the factor of w*. exploration: the factor of a_i for right completions.
        success: the reward from which on a completion is right.

    Settled here: as in the paper's objective, with a mean over tokens; the authors' scripts divide by a constant length
    and not by σ.

    Reference: SRFT: A Single-Stage Method with Supervised and Reinforcement Fine-Tuning, 2025, arXiv 2506.19767 (row
    SRFT of card 046).
    """
    certain = EntropyWeighted(imitation, sign=-1)
    demonstration = Objective(GroupNormalised(eps=EPS), Probability(), (), TokenMean(), (certain,))
    right = EntropyWeighted(exploration, sign=1, success=success)
    rollouts = Objective(Failure(success), CurrentPolicy(), (), TokenMean(), (right,))
    terms = (Term(demonstration, ("expert",), whole=True), Term(rollouts, ("policy",)))
    return Method("srft", Mixture(terms), "prompts", ONLINE, rollouts=Label()).with_settings(group=7)
