r"""The policy against what it is asked: prompts that grow with it. Notation as in `policy_gradient.py`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from posttrain.methods.policy_gradient import ONLINE, rloo
from posttrain.methods.preference import dpo, orpo, simpo
from posttrain.methods.registry import method
from posttrain.objective.mask import DropTies
from posttrain.rollout.evolvers import Evolver, InstructionEvolver
from posttrain.rollout.strategies.evolve import Evolving
from posttrain.rollout.strategies.pairs import BestAgainstWorst
from posttrain.training.method import Method
from posttrain.trajectory import PosttrainError

Solver = Literal["dpo", "simpo", "orpo", "rloo"]
PREFERENCES: dict[str, Callable[[], Method]] = {"dpo": lambda: dpo(0.05), "simpo": simpo, "orpo": orpo}


@method(family="self-training", card="021")
def eva(
    solver: Solver = "dpo",
    evolver: Evolver | None = None,
    informativeness: str = "gap",
    share: float = 0.8,
    mixing: float = 0.1,
    autonomous: float = 0.5,
    offspring: int = 4,
    iteration: int = 25,
    capacity: int = 10_000,
) -> Method:
    r"""eva: a creator evolves the prompts on which the policy's own answers differ most; a solver learns from them.

    .. math:: \mathrm{info}(x) = \max_i r(x, y_i) - \min_i r(x, y_i),\qquad p(x) = \mathrm{info}(x) / \sum \mathrm{info}

    The regret of a prompt, how far the policy is from the best answer, is unknown; the gap between its best and its
    worst answer stands for it. The solver is any method: DPO on the best against the worst answer of every prompt
    (SimPO, ORPO likewise), or RLOO.

    Args:
        solver: `dpo` (β = 0.05), `simpo`, `orpo` or `rloo`, each with its own loss.
        evolver: makes new prompts of old ones: a `RuleEvolver`, which knows their answers, or (None) an
            `InstructionEvolver`: the method's teacher, or the policy, rewrites them; the reward must then need no
            reference answer. It must not make held-out problems.
        informativeness: `gap`, or `mean-gap`, `duel`, `variance`; `uniform` and `inverse` are controls.
        share: of a step's prompts that are evolved; the others are the task's own. It is 0 at first.
        mixing, autonomous: shares of the steps at which it begins to rise, in a line, and at which it is reached.
        offspring: new prompts of each that is drawn. capacity: prompts remembered.
        iteration: steps after which DPO's reference is renewed: it becomes the policy as it is then.

    This is the online form: every step evolves prompts drawn from those visited so far, by what was found at their
    last visit. Settled here: the line of `share`, prompts drawn without replacement, and at least one prompt that is
    decided is needed for a gradient. n is 6 completions at temperature 0.7.
    Reference: Scalable Reinforcement Post-Training Beyond Static Human Prompts: Evolving Alignment via Asymmetric
    Self-Play, 2024, arXiv 2411.00062 (card 021).
    """
    if solver not in (*PREFERENCES, "rloo"):
        raise PosttrainError(f"eva: solver is {solver!r}; expected {', '.join(PREFERENCES)} or rloo")
    creator = Evolving(evolver or InstructionEvolver(), informativeness, share, mixing, autonomous, offspring, capacity)
    settings = {"group": 6, "temperature": 0.7}
    if solver == "rloo":
        return rloo().replace(rollouts=creator).with_settings(**settings)
    preference = PREFERENCES[solver]().replace(masks=(DropTies(),))
    needs_reference = "reference_logp" in preference.objective.needs
    return Method(
        "eva",
        preference.objective,
        "prompts",
        ONLINE,
        rollouts=BestAgainstWorst(creator),
        reference_every=iteration if needs_reference else None,
    ).with_settings(**settings)
