"""Prompts that evolve with the policy, on sums whose difficulty is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from posttrain import methods
from posttrain.evaluation.task import Task, TaskItem
from posttrain.lab.worlds.arithmetic import carries_of
from posttrain.lab.worlds.world import is_heldout
from posttrain.models.causal import CausalPolicy
from posttrain.reward.reward import Reward
from posttrain.rollout.evolvers import RuleEvolver, Variation
from posttrain.studies.arms import in_lab, trained
from posttrain.studies.registry import study
from posttrain.studies.study import Arm, Study
from posttrain.studies.verdict import Better
from posttrain.training.stage import Trained
from posttrain.trajectory import Finish, Prompt

LONGEST = 3  # digits of an evolved operand, as many as the hardest that is held out


def right_digits(completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
    """Share of the answer's digits that stand at their place, counted from the units."""
    given, gold = completion.strip(), str(prompt.answer)
    if not given.isdigit():
        return 0.0
    return sum(a == b for a, b in zip(reversed(given), reversed(gold), strict=False)) / max(len(given), len(gold))


def harder_sum(prompt: Prompt, chance: np.random.Generator) -> Variation | None:
    """A sum with one digit more in both operands, or with more carries; never one that is held out."""
    first, second = (int(x) for x in prompt.question.strip().split("+"))
    digits, carries = len(str(first)), carries_of(first, "+", second)
    longer = bool(chance.integers(2)) or carries >= digits
    if longer and digits >= LONGEST:
        return None
    size = digits + longer
    for _ in range(200):
        a, b = (int(x) for x in chance.integers(10 ** (size - 1), 10**size, 2))
        item = TaskItem(f"{a}+{b}", str(a + b), {**prompt.meta, "digits": size, "carries": carries_of(a, "+", b)})
        if (longer or item.meta["carries"] > carries) and not is_heldout(item):
            return Variation(str(item.prompt), item.answer, item.meta)
    return None


def easy_sums() -> Task:
    """Trained on two-digit sums without a carry; held out are those with carries, and three-digit ones."""
    from posttrain import lab

    task = lab.task("tiers", heldout=450)
    return replace(
        task,
        train=[item for item in task.train if item.meta["domain"] == "easy"],
        heldout=[item for item in task.heldout if item.meta["domain"] != "easy"],
        reward=Reward({"digits": (right_digits, 1.0), "correct": (task.reward.components["correct"][0], 0.0)}),
        metric="correct",
    )


def how_far_it_went(policy: CausalPolicy, task: Task, result: Trained) -> dict[str, float]:
    """`undecided`: share of prompts whose completions differ in worth; `generation`: of the buffer at the end."""
    rows = result.metrics
    return {
        "undecided": sum(row["undecided"] for row in rows) / len(rows),
        "generation": rows[-1]["generation"],
    }


def _evolving(informativeness: str, share: float = 0.8) -> Arm:
    made = in_lab(methods.eva("rloo", RuleEvolver(harder_sum), informativeness, share), steps=120)
    return trained(made, task=easy_sums, extra=how_far_it_went, prompts=300, depends=(easy_sums,))


@study(method="eva", card="021")
def eva() -> Study:
    """A creator makes prompts harder where answers differ most; against none, against chance, against its opposite.

    The lab model `tiers` adds two-digit numbers: nine of ten sums without a carry, less than half of those with one,
    next to none of three digits. It is trained on sums without a carry alone. The creator's rule gives both operands
    one digit more (up to three), or redraws them with more carries; it never makes a held-out sum. The reward is
    the share of right digits, the solver RLOO at temperature 0.7. All arms have 120 steps of 16 prompts x 8
    completions; they differ in which prompts are evolved: none (`static`), any (`uniform`), by the gap between best and
    worst completion (`eva`), or by its inverse.

    Rule, fixed before the run: on 300 held-out sums with carries or three digits, over four seeds, `eva` is more
    accurate than each of the three others (the paper's order is eva, uniform, static, inverse).
    """
    return Study(
        claim="Training on prompts evolved from the informative ones beats a static set, evolution of any prompt, and "
        "evolution of the least informative.",
        setting="lab model tiers, trained on two-digit sums without carries, held out harder ones; 120 steps x 16 "
        "prompts x 8 completions, equal for all arms.",
        arms={
            "static": _evolving("gap", 0.0),
            "uniform": _evolving("uniform"),
            "eva": _evolving("gap"),
            "inverse": _evolving("inverse"),
        },
        expectations=(
            Better("eva", than="static", metric="accuracy", why="new, harder prompts"),
            Better("eva", than="uniform", metric="accuracy", why="chosen by what the policy has to learn"),
            Better("eva", than="inverse", metric="accuracy", why="the negative control"),
        ),
        seeds=4,
        notes="Tried on seed 100: operands of up to four digits, where the gap mostly chose sums that were hopeless "
        "and whose rewards differed by chance (the card's own warning); three digits are as many as are held out.",
    )
