r"""Learning from a teacher's judgement of the policy's own completions.

Notation: :math:`R_{it} = \log\pi_T(y_{it}) - \log\pi_\theta(y_{it})` of a sampled token, Â the advantage of its
completion within its group, N the tokens of the step. The teacher shares the policy's tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

from posttrain.methods.policy_gradient import ONLINE
from posttrain.methods.registry import method
from posttrain.models.causal import CausalPolicy
from posttrain.objective.advantage import GroupNormalised
from posttrain.objective.aggregate import TokenMean
from posttrain.objective.denominator import CurrentPolicy, OldPolicy
from posttrain.objective.estimator import Objective
from posttrain.objective.schedule import Decline
from posttrain.objective.teacher import BOUND, TeacherKL, TeacherLogRatio
from posttrain.reward.shapings.solved import Solved
from posttrain.training.method import Method
from posttrain.trajectory import PosttrainError

Teacher = str | Path | CausalPolicy
Estimator = Literal["k2", "k3"]
Where = Literal["all", "failed", "unsolved"]


@method(family="distillation", card="023")
def kdrl(
    teacher: Teacher | None = None,
    beta: float = 5e-3,
    slope: float = 5e-5,
    floor: float = 1e-3,
    estimator: Estimator = "k2",
    where: Where = "all",
    success: float = 1.0,
    bound: float = BOUND,
) -> Method:
    r"""KDRL: GRPO with a pull to a teacher, the reverse KL on the policy's own completions.

    .. math:: L = -\frac1N\sum_i\sum_t \big(\rho_{it}\hat A_i - \beta(s) K_{it}\big),\qquad K_{it} = \tfrac12 R_{it}^2,
              \qquad \beta(s) = \max(\beta_0 - \delta s,\ \beta_{min})

    The gradient of K is that of the reverse KL to the teacher, in expectation; it acts also on groups whose rewards are
    all equal. Nothing is clipped: one update a step.

    Args:
        teacher: a model id, a folder or a loaded policy with the same tokenizer.
        beta, slope, floor: β_0, δ a step and β_min. slope 0 keeps β constant (the paper: 2e-3).
        estimator: of K: k2, or k3 (:math:`e^R - R - 1`), whose gradient is that of the forward KL.
        where: K on `all` completions, on `failed` ones only, or on those of `unsolved` prompts, of whose group none is
            right.
        success: the reward from which on a completion is right.
        bound: nats; a token with a larger \|R\| pulls as one at the bound. The metric `teacher_bound` says how often.

    Settled here: N counts the tokens of the step, as the estimator's peers do. K over the full vocabulary or its
    largest entries is not provided; the paper found the latter unstable.

    Reference: KDRL: Post-Training Reasoning LLMs via Unified Knowledge Distillation and RL, 2025, arXiv 2506.02208
    (card 023).
    """
    for name, value, known in (("estimator", estimator, get_args(Estimator)), ("where", where, get_args(Where))):
        if value not in known:
            raise PosttrainError(f"kdrl: {name} is {value!r}; expected one of {', '.join(known)}")
    pull = TeacherKL(Decline(beta, slope, floor) if slope else beta, estimator, where, success, bound)
    objective = Objective(GroupNormalised(), OldPolicy(), (), TokenMean(), (pull,))
    shaping = (Solved(success),) if where == "unsolved" else ()
    return Method("kdrl", objective, "prompts", ONLINE, shaping=shaping, teacher=teacher)


@method(family="distillation", card="023")
def kd_rkl(teacher: Teacher | None = None, bound: float = BOUND) -> Method:
    r"""On-policy distillation: the reverse KL to a teacher on the policy's own completions, and nothing else.

    .. math:: L = -\frac1N\sum_i\sum_t \mathrm{sg}[R_{it}]\,\log\pi_\theta(y_{it})

    The token's log-ratio is its reward. No task reward is looked at: a policy gets no better than its teacher.

    Args:
        teacher: a model id, a folder or a loaded policy with the same tokenizer.
        bound: nats; a larger \|R\| counts as this.

    Reference: the baseline KD-RKL of KDRL, 2025, arXiv 2506.02208 (card 023).
    """
    objective = Objective(TeacherLogRatio(bound), CurrentPolicy(), (), TokenMean())
    return Method("kd-rkl", objective, "prompts", ONLINE, teacher=teacher)
