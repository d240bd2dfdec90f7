"""In which proportions to mix training domains: what rules and a response surface make of a few runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np

from posttrain import lab, methods
from posttrain.data.mixture_weights import (
    Array,
    Record,
    additive,
    best_of_splits,
    collaborative,
    leave_one_out,
    matrix,
    named,
    propose,
    seed_mixtures,
)
from posttrain.lab.worlds import WorldTask, formats, mix
from posttrain.reward.reward import Reward
from posttrain.studies.arms import QUICK_PROMPTS, heldout_figures, in_lab, shortened
from posttrain.studies.curriculum import coin
from posttrain.studies.registry import study
from posttrain.studies.study import Arm, Measured, Study
from posttrain.studies.verdict import Better, Lower
from posttrain.training.stage import train_stage

Rule = Callable[[Sequence[Record], Sequence[str]], Array]

DOMAINS: dict[str, dict[str, Any]] = {
    "order": {"contents": ("rev", "sort"), "constraints": (1, 1)},
    "dress": {"contents": ("copy", "rep"), "constraints": (3, 3)},
    "known": {"contents": ("copy", "rep"), "constraints": (1, 1)},
    "noise": {"contents": ("rev", "sort"), "constraints": (2, 2)},
}
STEPS, GROUP = 40, 6
CHECKED = 4  # mixtures that the surfaces are held to, and that they never saw


def four_domains(domains: Mapping[str, Mapping[str, Any]]) -> WorldTask:
    """Instructions of four kinds. No prompt is in two of them; the rewards of `noise` are thrown by a coin."""
    parts = {name: formats(**given, train=400, heldout=0, name=name) for name, given in domains.items()}
    parts["noise"] = replace(parts["noise"], reward=Reward({"answer": (coin, 0.5), "format": (coin, 0.5)}))
    return mix(parts, name="four domains")


def elsewhere(seed: int) -> WorldTask:
    """What nothing was trained on: letters to be put in another order and dressed in three ways."""
    return formats(contents=("rev", "sort"), constraints=(3, 3), train=0, heldout=192, seed=seed, name="elsewhere")


@dataclass(frozen=True)
class Run:
    """A training run on one mixture. chosen_by: accuracy elsewhere, for choosing; accuracy: on other problems."""

    chosen_by: float
    accuracy: float
    rollouts: int
    seconds: float
    tokens: int


_RUNS: dict[tuple[object, ...], Run] = {}  # the arms of one process have their first runs in common


def run_once(seed: int, quick: bool, weights: Mapping[str, float]) -> Run:
    """`train_on`, or what it found before."""
    key = (seed, quick, *weights.items())
    if key not in _RUNS:
        _RUNS[key] = train_on(seed, quick, weights)
    return _RUNS[key]


def train_on(seed: int, quick: bool, weights: Mapping[str, float]) -> Run:
    """Train the lab's model on one mixture of the four domains."""
    method, task = in_lab(methods.modomodo(weights), steps=STEPS, group=GROUP), four_domains(DOMAINS)
    result = train_stage(lab.model("formats"), shortened(method) if quick else method, task, seed=seed)
    count = QUICK_PROMPTS if quick else 192
    chosen_by, accuracy = (
        heldout_figures(result.policy, elsewhere(own), samples=4, ks=(1,), prompts=count)["accuracy"] for own in (1, 0)
    )
    return Run(chosen_by, accuracy, result.rollouts, result.seconds, result.tokens)


def mixed(
    seed: int, quick: bool, *, rule: Rule | None, degree: int | None, domains: Mapping[str, Any], model: str
) -> Measured:
    """Choose weights by a rule from nine first runs (None: equal parts, from none), and train on them.

    Figures: `accuracy` on problems of no domain; `weight/<domain>`; with `degree`, `error`: root mean square of what a
    surface of that degree says of mixtures that it was not fitted to, minus what they led to. `domains`, `model` (the
    lab's key): that other ones are another arm.
    """
    assert domains == DOMAINS
    names = list(domains)
    first: list[Run] = []
    weights = np.full(len(names), 1 / len(names))
    figures: dict[str, float] = {}
    if rule is not None:
        mixtures = seed_mixtures(names)
        first = [run_once(100 * seed + i, quick, given) for i, given in enumerate(mixtures)]
        records = [Record(given, run.chosen_by) for given, run in zip(mixtures, first, strict=True)]
        weights = rule(records, names)
        if degree is not None:
            unseen = np.random.default_rng([seed, CHECKED]).dirichlet(np.ones(len(names)), CHECKED)
            found = [run_once(100 * seed + 50 + i, quick, named(w, names)).chosen_by for i, w in enumerate(unseen)]
            surface = best_of_splits(matrix(records, names), np.array([run.chosen_by for run in first]), degree)
            figures["error"] = float(np.sqrt(((surface(unseen) - np.array(found)) ** 2).mean()))
    last = run_once(100 * seed + 99, quick, named(weights, names))
    figures["accuracy"] = last.accuracy
    figures |= {f"weight/{name}": w for name, w in named(weights, names).items()}
    runs = [*first, last]
    return Measured(
        figures,
        {},
        rollouts=sum(run.rollouts for run in runs),
        seconds=sum(run.seconds for run in runs),
        tokens=sum(run.tokens for run in runs),
    )


def best_seen(records: Sequence[Record], domains: Sequence[str]) -> Array:
    """The mixture of the run that led to most."""
    best = int(np.argmax([record.outside for record in records]))
    return np.asarray(matrix(records, domains)[best])


def best_predicted(records: Sequence[Record], domains: Sequence[str], degree: int) -> Array:
    """The mixture that a surface of that degree thinks best."""
    return np.asarray(propose(records, domains, 1, degree=degree)[0])


def _mixed(rule: Rule | None, degree: int | None = None) -> Arm:
    arguments = {"rule": rule, "degree": degree, "domains": DOMAINS, "model": lab.preset("formats").key}
    return Arm(mixed, arguments, (methods.modomodo, formats, coin, best_of_splits, seed_mixtures))


@study(method="modomodo", card="034")
def modomodo() -> Study:
    """A few runs on chosen mixtures say which mixture to train on, better than equal parts do.

    The lab model `formats` follows instructions such as "rev dcab;up;dot" (BACD.). It is trained on four domains and
    tested on what none of them holds: letters to be reversed or sorted, under three constraints. `order` trains the
    first half of that (one constraint), `dress` the second (copied or repeated letters, three constraints), so that
    these two help together; `known` is mostly solved already; the rewards of `noise` are thrown by a coin. A run is 40
    steps of 16 prompts x 6 completions with the paper's KL (0.04), for every mixture the same. Each rule is given the
    nine first runs that the paper names (each domain alone, all but each, all) with their scores on 192 problems of
    the test, and has one run on the weights that it chooses, scored on 192 others, from the same seed in all arms.
    `uniform` needs no first runs; `best seen` runs the best of the nine mixtures anew: the baseline at equal cost.
    `plane` is a surface without the products of weights.

    Rule, fixed before the run, over four seeds: the surface's mixture and the paper's best heuristic (`norm`) lead to a
    higher accuracy than equal parts, the surface to no less than the best seen by more than 2 points, and its error on
    four mixtures that it was not fitted to is smaller than the plane's. With nine runs for ten coefficients the fit is
    that of the smallest norm, so that last one is much to ask.
    """
    return Study(
        claim="Mixture weights chosen from a few runs, by a quadratic surface or a leave-one-out rule, beat equal "
        "parts on tests of other domains; a surface without products of weights does not fit.",
        setting=f"lab model formats, four domains of instructions; each run {STEPS} steps x 16 prompts x {GROUP} "
        "completions; nine first runs and one on the chosen weights in all arms but uniform, which has the last alone.",
        arms={
            "uniform": _mixed(None),
            "best seen": _mixed(best_seen),
            "alpha": _mixed(partial(additive, alpha=0.0)),
            "coli": _mixed(collaborative),
            "norm": _mixed(leave_one_out),
            "surface": _mixed(partial(best_predicted, degree=2), 2),
            "plane": _mixed(partial(best_predicted, degree=1), 1),
        },
        expectations=(
            Better("surface", than="uniform", metric="accuracy", why="noise and the known get little, the rest more"),
            Better("norm", than="uniform", metric="accuracy", why="the paper's best number is this rule's"),
            Better("surface", than="best seen", metric="accuracy", margin=-0.02, why="as good as the best of its runs"),
            Lower("surface", than="plane", metric="error", why="two domains help only together"),
        ),
        seeds=4,
        notes="Alpha looks at the scores of other domains alone (alpha 0). Rollouts and seconds are those of all runs "
        "that led to the arm's result, though arms share their first runs where one process trains them; the four "
        "mixtures behind `error` are not counted. A score is that of one run: how much runs differ by seed is in it.",
    )
