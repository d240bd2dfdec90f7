"""Imitation of flawed demonstrations: what DFT's weights and ASFT's anchor change."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import torch
from torch import Tensor

from posttrain import lab, methods
from posttrain.evaluation.task import Task, TaskItem
from posttrain.lab.worlds import WorldTask
from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.studies.arms import in_lab, trained
from posttrain.studies.registry import study
from posttrain.studies.study import Arm, Study
from posttrain.studies.verdict import Better, Expectation, Lower
from posttrain.training.method import Method
from posttrain.training.signals import per_token
from posttrain.training.stage import Trained
from posttrain.trajectory import Group

PRESET, TAUGHT = "three-tasks", "add"
FLAWED = 0.15
ROWS, EPOCHS = 1200, 2


def flawed_sums() -> Task:
    """Sums, in 15 % of whose demonstrations one digit of the answer is wrong (`meta["flaw"]`: its place)."""
    task = lab.worlds.three_tasks(only=TAUGHT, train=ROWS, heldout=300)
    chance = random.Random("flawed sums")
    return replace(task, train=[_flawed(i, chance) if chance.random() < FLAWED else i for i in task.train])


def _flawed(item: TaskItem, chance: random.Random) -> TaskItem:
    digits = list(str(item.solution))
    place = chance.randrange(len(digits))
    digits[place] = chance.choice([d for d in "0123456789" if d != digits[place]])
    return replace(item, solution="".join(digits), meta={**item.meta, "flaw": place})


def drift(policy: CausalPolicy, task: Task, result: Trained) -> dict[str, float]:
    """How far the policy moved, and what it learned of the flaws.

    `drift`: KL(first policy ‖ policy), nats a token, on the held-out answers of the trained task; `doublings`: its
    base-2 logarithm. `other_drift`, `other_nll`: the same KL, and nats a token of the right answers, on the two tasks
    that were not trained. `sure`: share of the demonstrated tokens with a probability above 0.95. `flaw_p`: mean
    probability of the wrong digits.
    """
    first = lab.model(PRESET)
    assert isinstance(task, WorldTask)
    others = lab.task(PRESET, train=0)
    untouched = [item for item in others.heldout if item.meta["domain"] != TAUGHT]
    away = Batch.of(others.demonstrated(untouched, policy.tokenizer))
    here = Batch.of(task.demonstrated(task.heldout, policy.tokenizer))
    moved = float(_divergence(first, policy, here).mean())
    shown = task.demonstrated(task.train, policy.tokenizer)
    p = _logp(policy, Batch.of(shown)).exp()
    return {
        "drift": moved,
        "doublings": math.log2(max(moved, 1e-9)),
        "other_drift": float(_divergence(first, policy, away).mean()),
        "other_nll": -float(_logp(policy, away).mean()),
        "sure": float((p > 0.95).float().mean()),
        "flaw_p": float(p[_flaws(task.train, shown)].mean()),
    }


def _logp(policy: CausalPolicy, batch: Batch) -> Tensor:
    return per_token(batch, 8192, lambda part: policy.log_likelihood(part).logp)


def _divergence(first: CausalPolicy, policy: CausalPolicy, batch: Batch) -> Tensor:
    def forward(part: Batch) -> Tensor:
        found = policy.log_likelihood(part, reference=first.log_likelihood(part), divergence="forward").divergence
        assert found is not None
        return found

    return per_token(batch, 8192, forward)


def _flaws(items: list[TaskItem], shown: list[Group]) -> Tensor:
    """Places of the wrong digits among the demonstrated tokens: answers are written a digit a token."""
    found, start = [], 0
    for item, group in zip(items, shown, strict=True):
        if "flaw" in item.meta:
            found.append(start + item.meta["flaw"])
        start += group.trajectories[0].actions
    return torch.tensor(found)


def _arm(method: Method) -> Arm:
    made = in_lab(method, steps=None, epochs=EPOCHS, batch=16)
    return trained(made, preset=PRESET, task=flawed_sums, extra=drift, depends=(flawed_sums, drift))


def _arms() -> dict[str, Arm]:
    return {
        "sft": _arm(methods.sft()),
        "sft+kl": _arm(methods.asft(weighted=False)),
        "dft": _arm(methods.dft()),
        "asft": _arm(methods.asft()),
    }


SETTING = (
    "lab model three-tasks (reverse letters, sort digits, add), fine-tuned on 1200 sums, of which 15 % have a wrong "
    "digit, 2 epochs of batches of 16 at 3e-4 for all arms."
)


@study(method="asft", card="051")
def asft() -> Study:
    """The anchor keeps what DFT lets drift, and costs nothing on the task.

    The lab model `three-tasks` half knows three tasks. It is fine-tuned on demonstrations of one of them, sums, of
    which 15 % are flawed; the other two show what fine-tuning does beside its purpose. Four arms on the same 150
    batches: SFT, SFT with the anchor, DFT, and DFT with the anchor, which is ASFT (λ = 0.1, KL of the first policy to
    the present one).

    Rule, fixed before the run: ASFT's drift, KL(π_0‖π_θ) on held-out sums, is at most half of DFT's (a doubling
    fewer); ASFT's held-out accuracy on sums is not lower than SFT's by more than 1 point; the likelihood of
    the other tasks' right answers falls less than with SFT and with DFT. Five seeds make the order of the rows.
    """
    rules: tuple[Expectation, ...] = (
        Lower("asft", than="dft", metric="doublings", margin=1.0, why="DFT has no anchor: its weight moves with it"),
        Better("asft", than="sft", metric="accuracy", margin=-0.01, why="the anchor must not cost the task"),
        Lower("asft", than="sft", metric="other_nll", why="the anchor keeps the other tasks"),
        Lower("asft", than="dft", metric="other_nll", why="the anchor keeps the other tasks"),
    )
    return Study(
        claim="ASFT learns the task as well as SFT, and drifts far less from the first model than DFT.",
        setting=SETTING,
        arms=_arms(),
        expectations=rules,
        seeds=5,
    )


@study(method="dft", card="051")
def dft() -> Study:
    """DFT's weight, the token's own probability, should keep flaws out, and sharpen what is known already.

    The arms SFT and DFT of the study `asft`: sums of which 15 % are shown with a wrong digit. A wrong digit is
    improbable, so DFT pulls at it little; a token known well is pulled at in full.

    Rule, fixed before the run: after DFT the flawed digits have a lower probability than after SFT, and a larger share
    of the demonstrated tokens is above 0.95; the held-out accuracy is not lower than SFT's by more than 1 point.
    """
    rules: tuple[Expectation, ...] = (
        Lower("dft", than="sft", metric="flaw_p", why="improbable tokens pull with their own probability"),
        Better("dft", than="sft", metric="sure", why="DFT sharpens"),
        Better("dft", than="sft", metric="accuracy", margin=-0.01, why="flaws should not cost accuracy"),
    )
    arms = {name: arm for name, arm in _arms().items() if name in ("sft", "dft")}
    return Study(
        claim="DFT learns flawed tokens less than SFT and sharpens the known ones, without losing accuracy.",
        setting=SETTING,
        arms=arms,
        expectations=rules,
        seeds=5,
    )
