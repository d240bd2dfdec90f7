"""RL straight from a base model, and what pre-training decides about it: recipes whose parts are mostly known ones.

Notation as in `policy_gradient.py`.
"""

from __future__ import annotations

from functools import partial

from posttrain.data.difficulty import MatchedLevels
from posttrain.methods.policy_gradient import ONLINE, grpo
from posttrain.methods.registry import method
from posttrain.objective.aggregate import TokenMean
from posttrain.objective.divergence import EntropyBonus, ReferenceKL
from posttrain.objective.estimator import Objective
from posttrain.objective.imitation import Accepted
from posttrain.reward.shapings.correctness import Correctness
from posttrain.reward.shapings.process import ProcessReward
from posttrain.training.method import Method
from posttrain.trajectory import PosttrainError


@method(family="policy-gradient", card="100")
def zero_rl(
    clip: float = 0.2,
    beta: float = 1e-4,
    entropy: float = 0.001,
    correct: str | None = None,
    form: str | None = None,
    level: str | None = "domain",
    low: float = 0.1,
    high: float = 0.8,
) -> Method:
    r"""RL from a base model: GRPO on being right alone, on problems that the model solves sometimes.

    .. math:: L = -\frac{1}{\sum_i T_i}\sum_i\sum_t
              \min(\rho_t A_i, \mathrm{clip}(\rho_t, 1\mp\epsilon) A_i) + \beta\,\mathrm{KL}_{k3} - c_H H,\qquad
              R_i = 1[\text{right}]

    There is no format reward. Levels that the model solves hardly ever or nearly always are left out, by tries at some
    prompts of each before the first step. `evaluation.behaviour` watches a run as the paper does.

    Args:
        clip: ε. beta: weight of the KL to the first policy (the paper: 1e-4 to 14 billion parameters, 1e-3 above).
        entropy: c_H.
        correct: the component of the reward that says what is right (1 is); None takes the task's total.
        form: a component for the form of the answer turns on the paper's harmful rigid reward: 1 right and well
            formed, 0.5 right only, -0.5 well formed only, -1 neither. It needs `correct`.
        level: the label of prompts that names their level; None takes all prompts as they come.
        low, high: the pass rates between which a level is trained on; where none is, the nearest level is.

    Settled here: 32 prompts of each level are tried 4 times. The paper: 8 completions a prompt, 1,024 prompts a step
    in minibatches of 256, about 100 steps.

    Reference: SimpleRL-Zoo: Investigating and Taming Zero Reinforcement Learning for Open Base Models in the Wild,
    2025, arXiv 2503.18892 (card 100).
    """
    if form is not None and correct is None:
        raise PosttrainError(
            f"zero-rl: form={form!r} needs correct=<component that says what is right>: the total holds the form, too"
        )
    made = grpo(clip).replace(
        aggregate=TokenMean(),
        divergences=(
            *((ReferenceKL(beta),) if beta else ()),
            *((EntropyBonus(entropy),) if entropy else ()),
        ),
        shaping=(Correctness(correct, form),),
    )
    if level is None:
        return made
    return made.replace(sampler=partial(MatchedLevels, by=level, low=low, high=high, component=correct))


@method(family="self-training", card="121")
def expert_iteration(success: float = 1.0, distinct: bool = True, updates: int = 2) -> Method:
    r"""Expert iteration: sample many completions, imitate the right and different ones for some epochs, and repeat.

    .. math:: L = -\frac{1}{N^+}\sum_{i \in D}\sum_t \log\pi_\theta(y_{it}),\qquad
              D = \{i : R_i \ge r,\ y_i \ne y_j \text{ for all earlier } j \text{ of the prompt}\}

    N⁺ counts the tokens of D. A prompt that is always solved in the same words teaches as much as one solved once.

    Args:
        success: r, the reward from which on a completion is imitated. distinct: imitate equal completions of a prompt
            once (False: each of them, as `raft` does). updates: epochs over a step's completions.

    Settled here: an iteration is a step, and goes on from the policy as it is (the online form; the paper also starts
    each iteration from the base model, which a step cannot). The paper draws 64 completions a prompt at temperature 1.

    Reference: Echo Chamber: RL Post-training Amplifies Behaviors Learned in Pretraining, 2025, arXiv 2504.07912
    (card 121).
    """
    made = Method("expert-iteration", Objective(Accepted(success, distinct)), "prompts", ONLINE)
    return made.with_settings(updates=updates, group=64)


@method(family="policy-gradient", card="144")
def process_grpo(
    outcome: float = 0.2,
    process: float = 0.8,
    strict: bool = False,
    clip: float = 0.2,
    beta: float = 1e-3,
    answer: str = "answer",
    working: str = "process",
) -> Method:
    r"""GRPO on an outcome whose reward is earned by its steps: a right answer by wrong steps is worth little.

    .. math:: R = 0 \text{ if the answer is wrong, else } w_{out} R_{out} + w_{proc} R_{proc},\qquad
              L = L_{GRPO}(R) + \beta\,\mathrm{KL}_{k3}

    .. math:: R_{proc} = \max\big(0, 1 - (\#values + \#dependencies + \#missing + \min(\#extra, N)) / N\big)

    for a solution of N steps, each compared with the reference graph: wrong values, wrong parents, steps left out,
    steps too many (the lab's world `words` judges so).

    Args:
        outcome, process: the weights; (1, 0) is GRPO on the outcome. strict: no reward at all with any step wrong.
        clip: ε. beta: KL weight. answer, working: the reward's components for the answer and its steps.

    Settled here: "strict" takes the outcome's part away, too. Six completions a prompt are the paper's.

    Reference: On the Interplay of Pre-Training, Mid-Training, and RL on Reasoning Language Models, 2025, arXiv
    2512.07783 (card 144).
    """
    made = grpo(clip, beta).replace(shaping=(ProcessReward(outcome, process, strict, answer, working),))
    return made.with_settings(group=6)
