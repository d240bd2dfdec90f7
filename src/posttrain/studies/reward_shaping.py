"""Studies of rewards that are doubted, disturbed or compared: Trust-GRPO, noisy rewards, RPR, TimeHC-RL."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from posttrain import methods
from posttrain.evaluation.task import Task
from posttrain.models.causal import CausalPolicy
from posttrain.reward.reasoning_pattern import ReasoningPattern
from posttrain.reward.reward import Reward
from posttrain.reward.shapings.pattern import Calibrated, PatternOnly
from posttrain.rollout.strategies.twin import reordered
from posttrain.studies.arms import QUICK_PROMPTS, heldout_figures, in_lab, trained
from posttrain.studies.registry import study
from posttrain.studies.study import Arm, Study
from posttrain.studies.verdict import AtLeast, AtMost, Better, Within
from posttrain.training.method import Method, Pipeline
from posttrain.training.stage import Trained
from posttrain.trajectory import Finish, Prompt


def late(result: Trained, name: str) -> float:
    """A training metric, averaged over the steps of the last quarter that have it; NaN where none has."""
    rows = result.metrics[-max(1, len(result.metrics) // 4) :]
    found = [row[name] for row in rows if name in row]
    return sum(found) / len(found) if found else float("nan")


def gained(policy: CausalPolicy, task: Task, result: Trained, preset: str) -> dict[str, float]:
    """`gain`: how much the accuracy rose over that of the preset's model before training, on 192 held-out problems."""
    from posttrain import lab

    prompts = QUICK_PROMPTS if result.steps < 10 else 192
    before, after = (
        heldout_figures(p, task, samples=8, ks=(1,), prompts=prompts)["accuracy"] for p in (lab.model(preset), policy)
    )
    return {"gain": after - before}


# -- Trust-GRPO ------------------------------------------------------------------------------------------------------


def long_winded(completion: str, prompt: Prompt) -> float:
    """A thinking reward that is easily hacked: the longer the better, up to 40 characters."""
    return min(1.0, len(completion) / 40)


def upside_down(completion: str, prompt: Prompt) -> float:
    """A thinking reward that is wrong: the share of the working that is not right."""
    from posttrain.lab.worlds.arithmetic import process_score

    return 1.0 - process_score(completion, prompt)


def thought(policy: CausalPolicy, task: Task, result: Trained) -> dict[str, float]:
    """`process`: share of right lines in the working; `trust`: mean γ of undecided groups over all steps."""
    trusts = [row["trust"] for row in result.metrics if "trust" in row]
    found = {"process": late(result, "reward/process")}
    return found | ({"trust": sum(trusts) / len(trusts)} if trusts else {"trust": 1.0})


def _worked(method: Method) -> Arm:
    return trained(in_lab(method, max_tokens=40, steps=60), preset="working", ks=(1,), extra=thought)


@study(method="trust-grpo", card="111")
def trust_grpo() -> Study:
    """A thinking reward helps where it is good, and trust and annealing keep one that is not from doing harm.

    The lab model `working` adds two-digit numbers with written working. Three thinking rewards beside the exact
    outcome: the share of right lines (good), the length (easily hacked), and the share of wrong lines (wrong). Every
    arm has a KL of 0.04 and 60 steps of 16 problems x 8 completions; `hacked` leaves out trust, annealing and the rule
    that decided groups get no thinking reward. `process` is the share of right lines in the last quarter's rollouts.

    Rule, fixed before the run, over four seeds: with the good reward more lines are right than under GRPO, and accuracy
    does not fall by more than 3 points; the hacked arm is less accurate than the same reward under trust and annealing,
    which stays within 5 points of GRPO; the wrong reward is trusted less than 0.9 on average in undecided groups.
    """
    hacked = {"trust": False, "anneal": False, "drop": False}
    return Study(
        claim="A trust weight by group and an annealed share keep the gain of a good thinking reward and avert the "
        "harm of a hackable one.",
        setting="lab model working (addition with written working), 60 steps x 16 prompts x 8 rollouts, KL 0.04.",
        arms={
            "grpo": _worked(methods.grpo(beta=0.04)),
            "good": _worked(methods.trust_grpo()),
            "length, hacked": _worked(methods.trust_grpo(long_winded, **hacked)),
            "length": _worked(methods.trust_grpo(long_winded)),
            "wrong": _worked(methods.trust_grpo(upside_down)),
        },
        expectations=(
            Better("good", than="grpo", metric="process", why="the thinking is what the reward looks at"),
            Better("good", than="grpo", metric="accuracy", margin=-0.03, why="not at the cost of the answer"),
            Better("length", than="length, hacked", metric="accuracy", why="what trust and annealing are for"),
            Within("length", of="grpo", metric="accuracy", tolerance=0.05),
            AtMost("wrong", metric="trust", value=0.9, why="wrong completions score higher: γ < 1"),
        ),
        seeds=4,
    )


# -- noisy rewards ---------------------------------------------------------------------------------------------------


def gained_on_tiers(policy: CausalPolicy, task: Task, result: Trained) -> dict[str, float]:
    """See `gained`."""
    return gained(policy, task, result, "tiers")


def _noisy(method: Method) -> Arm:
    return trained(in_lab(method), extra=gained_on_tiers, every=20)


@study(method="noisy-rewards", card="079")
def noisy_rewards() -> Study:
    """Fewer than half of the prompts may lie: the signal shrinks by 1 - 2p, and its sign stays.

    The lab model `tiers` (arithmetic of three difficulties) under PPO with a critic, γ = λ = 1, no KL, of which the
    first 10 of 100 steps train the critic alone; 16 problems x 8 completions a step. The outcome reward of a share p of
    the prompts is flipped. Two more arms have GRPO's group baseline in the critic's place, which the paper did not
    try. Accuracy is by the clean verifier on 192 held-out problems, 8 samples each.

    Rule, fixed before the run, over four seeds: clean PPO gains at least 3 points; with p = 0.2 it ends within 4 points
    of clean; p = 0.4 is better than p = 0.5; and p = 0.5 gains at most 2 points.
    """

    def arm(p: float, **more: Any) -> Arm:
        return _noisy(methods.noisy_rewards(p, critic_warmup=10, **more))

    return Study(
        claim="PPO learns under flipped rewards for p < 1/2 (little is lost at 0.2) and not at 1/2.",
        setting="lab model tiers, 100 steps (10 of them critic alone) x 16 prompts x 8 rollouts, equal for all arms.",
        arms={
            "clean": arm(0.0),
            "p=0.2": arm(0.2),
            "p=0.4": arm(0.4),
            "p=0.5": arm(0.5),
            "p=0.4 by rollout": arm(0.4, per="rollout"),
            "grpo": trained(in_lab(methods.grpo())),
            "grpo p=0.4": _noisy(methods.noisy_rewards(0.4, critic=False)),
        },
        expectations=(
            AtLeast("clean", metric="gain", value=0.03, why="or there is nothing to disturb"),
            Within("p=0.2", of="clean", metric="accuracy", tolerance=0.04),
            Better("p=0.4", than="p=0.5", metric="accuracy"),
            AtMost("p=0.5", metric="gain", value=0.02, why="no signal"),
        ),
        seeds=4,
    )


# -- RPR -------------------------------------------------------------------------------------------------------------

SHOWN = ReasoningPattern(phrases=("=", "+", " "), most=3, answer="none")  # 1 for written working, 0 for a bare number


def shown(completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
    """RPR of a completion that has an extractable answer: one that is in a form of the world, right or wrong."""
    from posttrain.lab.worlds.arithmetic import style_of

    return SHOWN(completion, prompt) if style_of(completion) is not None else 0.0


def doubtful(completion: str, prompt: Prompt) -> float:
    """A reward model that prefers a right completion to a wrong one 65 times of 100: 70 % of the right ones score as
    low as wrong ones (0.2 to 0.4), the others 0.8. Which ones depends on prompt and completion, and stays the same."""
    from posttrain.lab.worlds.arithmetic import answer_score

    digest = hashlib.blake2b(f"{prompt.key}:{completion}".encode(), digest_size=2).digest()
    seen = bool(answer_score(completion, prompt)) and digest[0] < 0.3 * 256
    return 0.8 if seen else 0.2 + 0.2 * digest[1] / 255


def doubted() -> Task:
    """The task of `two-styles`, rewarded by the inaccurate model and measured by the exact verifier."""
    from posttrain import lab

    task = lab.task("two-styles")
    parts = {name: (function, 0.0) for name, (function, _) in task.reward.components.items()}
    return replace(task, reward=Reward({"model": (doubtful, 1.0), **parts}))


def peak_on_two_styles(policy: CausalPolicy, task: Task, result: Trained) -> dict[str, float]:
    """`peak`: the best accuracy on the way; `gain`; `worked`: the last quarter's share of written working."""
    return {
        **gained(policy, task, result, "two-styles"),
        "peak": max(point.figures["accuracy"] for point in result.curve),
        "worked": late(result, "reward/worked"),
    }


def gained_without_prior(policy: CausalPolicy, task: Task, result: Trained) -> dict[str, float]:
    """See `gained`; the model has only ever seen bare answers."""
    return gained(policy, task, result, "styles")


def _two_styles(method: Method, task: Callable[[], Task] | None = None) -> Arm:
    return trained(_brief(method), preset="two-styles", ks=(1,), every=10, extra=peak_on_two_styles, task=task)


def _brief(method: Method) -> Method | Pipeline:
    return in_lab(method, max_tokens=32, steps=50, learning_rate=1e-4)


@study(method="rpr", card="079")
def rpr() -> Study:
    """Reward for the look of reasoning finds what the model already can, and mends a reward model's false negatives.

    The lab model `two-styles` answers sums with a bare number (two thirds of its completions, a third of them right) or
    with written working (half of them right). The pattern is the presence of working in a completion of a proper form,
    whether it is right or not; a control model, `styles`, has only ever seen bare numbers. The reward model of the
    second experiment prefers a right completion to a wrong one in 65 % of pairs, as one of the paper's does;
    calibration adds 0.1 to scores below 0.5 of completions that show working. PPO as in the paper, 5 of 50 steps for
    the critic alone, 16 problems x 8 completions a step, a learning rate of 1e-4, equal for all arms.

    Rule, fixed before the run, over four seeds: the pattern alone peaks within 6 points of the verified reward
    (held-out accuracy every 10 steps); the control gains at most 2 points; the calibrated reward model ends more
    accurate than the plain one. `lifted` (also scores above 0.5) is shown without a rule.
    """
    ppo = methods.noisy_rewards(p=0.0, critic_warmup=5)
    only = ppo.replace(shaping=(PatternOnly(shown),))
    return Study(
        claim="Rewarding reasoning patterns alone peaks near the verified reward where the model knows how to reason, "
        "and lifting a reward model's low scores by them improves it.",
        setting="lab model two-styles (bare or worked sums), 50 steps x 16 prompts x 8 rollouts, equal for all arms.",
        arms={
            "verified": _two_styles(ppo),
            "pattern": _two_styles(only),
            "pattern, no prior": trained(_brief(only), preset="styles", ks=(1,), extra=gained_without_prior),
            "reward model": _two_styles(ppo, doubted),
            "calibrated": _two_styles(ppo.replace(shaping=(Calibrated(shown),)), doubted),
            "lifted": _two_styles(ppo.replace(shaping=(Calibrated(shown, below=2.0),)), doubted),
        },
        expectations=(
            Within("pattern", of="verified", metric="peak", tolerance=0.06),
            AtMost("pattern, no prior", metric="gain", value=0.02, why="nothing to find"),
            Better("calibrated", than="reward model", metric="accuracy"),
        ),
        seeds=4,
        notes="Tried with seed 100 before: at 3e-4 the pattern alone is hacked within 20 steps (proper form, "
        "wrong content) and its accuracy falls to 7 %; the rate of 1e-4 is the better one for it.",
    )


# -- TimeHC-RL -------------------------------------------------------------------------------------------------------


def another_order(question: str, prompt: Prompt, chance: np.random.Generator) -> str | None:
    """The characters of a string to rewrite, in another order; a sum has nothing to shuffle."""
    tag, _, text = question.rstrip().partition(": ")
    shuffled = None if tag == "add" else reordered(list(text), chance)
    return None if shuffled is None else f"{tag}: {''.join(shuffled)}\n"


def contrasted(policy: CausalPolicy, task: Task, result: Trained) -> dict[str, float]:
    """`gap`: how much more often the last quarter's rollouts are right on strings as they are than on shuffled ones."""
    return {"gap": late(result, "twin_gap")}


def _strings(**arguments: Any) -> Arm:
    method = methods.timehc_rl(format=".*", beta=0.0, perturb=another_order, **arguments)
    return trained(in_lab(method, max_tokens=8), preset="three-tasks", ks=(1,), extra=contrasted)


@study(method="timehc-rl", card="015")
def timehc_rl() -> Study:
    """Does a bonus for being better on ordered than on shuffled input teach the policy to heed the order?

    The lab model `three-tasks` reverses strings, where the order of the characters decides, sorts digits, where any
    order gives the same answer, and adds numbers, which have no order to shuffle and get no bonus. All completions have
    one form, so only the bonus differs between arms, and all draw the shuffled twins, whether they use them or not: 100
    steps of 16 problems x (8 + 8) completions. One pair of arms divides by the group's deviation and one does not: with
    one form, that division takes the bonus away again (the bonus is one number for all right completions of a prompt),
    which the last expectation states.

    Rule, fixed before the run, over four seeds: with the bonus (no division) the gap between ordered and shuffled
    accuracy is at least 5 points wider, and reversing is not solved less by more than 2 points; with the division, the
    bonus changes the accuracy by no more than 2 points.
    """
    return Study(
        claim="A contrastive bonus against shuffled input widens the gap between ordered and shuffled accuracy by 5 "
        "points and raises accuracy where order matters.",
        setting="lab model three-tasks, 100 steps x 16 prompts x (8 + 8 shuffled) rollouts, one form, equal for all.",
        arms={
            "no bonus": _strings(bonus=0.0, scale="none"),
            "bonus": _strings(scale="none"),
            "no bonus, divided": _strings(bonus=0.0),
            "bonus, divided": _strings(),
        },
        expectations=(
            Better("bonus", than="no bonus", metric="gap", margin=0.05, why="the paper's mechanism"),
            Better("bonus", than="no bonus", metric="accuracy/rev", margin=-0.02, why="where order matters"),
            Within("bonus, divided", of="no bonus, divided", metric="accuracy", tolerance=0.02, why="it cancels"),
        ),
        seeds=4,
        notes="No KL here (0.001 in the paper), so that no arm keeps a reference.",
    )
