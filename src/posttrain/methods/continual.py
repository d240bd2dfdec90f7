r"""Learning a new task without losing the old ones. Notation as in `policy_gradient.py`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from posttrain.data.domains import ByDomain
from posttrain.data.instance_filter import Competent
from posttrain.methods.policy_gradient import grpo
from posttrain.methods.registry import method
from posttrain.objective.denominator import CurrentPolicy
from posttrain.objective.estimator import Objective
from posttrain.objective.mixture import Term
from posttrain.objective.reweight import ChannelImitated, ChannelNormalised, ConvergenceWeights, Reweighted
from posttrain.rollout.strategies.replay import Replay
from posttrain.training.method import Method


@method(family="continual-learning", card="004")
def rif_rft(
    samples: int = 8,
    threshold: float = 1.0,
    beta: float = 0.0,
    clip: float = 0.2,
    component: str | None = None,
    drop_solved: bool = False,
) -> Method:
    r"""RIF-RFT: GRPO on the problems that the policy solves at least once in several tries before the training.

    .. math:: D' = \{x \in D : |\{n \le N : r(x, y_n) \ge \tau\}| \ge 1\},\qquad y_n \sim \pi_{\theta_{k-1}}(\cdot|x)

    On what is never solved, every group's rewards are equal: it costs rollouts and moves nothing. For tasks one after
    the other, `training.continual.train_in_sequence` trains on each and measures what became of those before
    (`evaluation.forgetting`); every task is filtered by the policy that its training starts from.

    Args:
        samples: N, tries for each problem, drawn before the first step (they count as rollouts of the run).
        threshold: τ, the reward from which a try is a success: 1 for right or wrong, about 0.5 for graded rewards.
        beta: weight of the KL to the stage's first policy; the paper finds that it does not matter. clip: ε.
        component: the reward component that τ speaks of; None takes the total.
        drop_solved: leave out the problems that are always solved, too (not part of the method).

    Settled here, since the paper's values are not known: N, τ and G (8). What the filter left out stays out for the
    stage. With `threshold` minus infinity it is GRPO.
    Reference: Reinforcement Fine-Tuning Naturally Mitigates Forgetting in Continual Post-Training, 2025, arXiv
    2507.05386 (card 004).
    """
    chosen = partial(Competent, samples=samples, threshold=threshold, component=component, drop_solved=drop_solved)
    return grpo(clip, beta).replace(sampler=chosen)


@method(family="continual-learning", card="012")
def recap(
    imitate: Sequence[str] = (),
    window: int = 10,
    tau: float = 5.0,
    components: Sequence[str] = (),
    beta: float = 0.0,
    clip: float = 0.2,
    by: str = "domain",
) -> Method:
    r"""RECAP: old tasks are replayed beside the new one, and every objective is weighted by how it has been doing.

    .. math:: L = \frac1K\sum_k \lambda_k L_k,\qquad \lambda_k = K\,\mathrm{softmax}_k\Big(\frac{c_k + i_k}{\tau}\Big),
              \qquad c_k = \frac{\mu_k}{\tilde\mu_k},\qquad i_k = \frac{\sigma_k}{\mu_k + \tilde\mu_k}

    μ_k and σ_k are mean and standard deviation of the last W values of objective k, :math:`\tilde\mu_k` the mean of the
    W before. The value is 1 - mean reward for what is learned by trial (with GRPO's loss), the mean negative
    log-likelihood a token for what is imitated. Objectives that stand still or fluctuate weigh more than those that
    improve.

    Args:
        imitate: domains that are replayed by imitation of their worked solutions; all others by trial.
        window: W in steps (counted for each objective in the steps that have it). tau: τ; inf weighs all alike.
        components: of the reward: each is an objective of its own for all rollouts, in the place of the domains; what
            is imitated is then one objective.
        beta: weight of a KL to the stage's first policy (0.01 is the paper's baseline, LwF). clip: ε.
        by: which label in a prompt's `meta` names its domain.

    Every step's rows are drawn from all domains alike. Settled here: W = 10; σ is that of the population; c is held
    in [0, 2]; an objective whose means are both below 0.001 has c = i = 0; K counts the objectives seen so far, and
    all λ are 1 until each has 2W values. Components have an advantage each; with several updates a step their weighted
    sum is clipped, not each. Reference: Beyond Reasoning Gains: Mitigating General Capabilities Forgetting in Large
    Reasoning Models, 2025, arXiv 2510.21978 (card 012).
    """
    trial = grpo(clip, beta).objective
    assert isinstance(trial, Objective)
    terms = [Term(trial.replace(advantage=ChannelNormalised(tuple(components))), ("policy",))]
    if imitate:
        terms.append(Term(Objective(ChannelImitated(bool(components)), CurrentPolicy()), ("replay",)))
    objective = Reweighted(tuple(terms), ConvergenceWeights(window, tau), tuple(components))
    return grpo().replace(objective=objective, sampler=partial(ByDomain, by=by), rollouts=Replay(tuple(imitate), by))
