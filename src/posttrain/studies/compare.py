"""Training one model by several methods under the same conditions, and judging them on the same held-out prompts.

Every method and seed is a job of its own: the same model, task, budget and held-out prompts. What a job found is a file
in the comparison's folder, so that a comparison that was stopped goes on with the job it was at, and methods or seeds
that are added later join what is there.
"""

from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.evaluation.evaluate import evaluate
from posttrain.evaluation.task import Task
from posttrain.models.causal import CausalPolicy
from posttrain.report.curves import rolling_mean
from posttrain.report.thin import spread
from posttrain.rollout.engine_choice import engine_for
from posttrain.studies import compare_page
from posttrain.studies.budget import Budget
from posttrain.studies.comparison import FULL, Comparison, Run, judge
from posttrain.studies.comparison_folder import opened, read_row, slug
from posttrain.studies.fingerprint import digest
from posttrain.studies.study import Curve
from posttrain.terminal import Counter, printable
from posttrain.training.checkpoint import write_text
from posttrain.training.method import Method, Pipeline, stages_of
from posttrain.training.scoring import sequence_scores
from posttrain.training.stage import Trained, train_stage
from posttrain.trajectory import PosttrainError, Sampling

BEFORE = "before.json"
OF_MODEL = ("correct",)  # what the files of jobs hold
OF_JOB = ("key", "correct", "curves", "seconds", "tokens", "rollouts", "steps")
PROBE = 3  # steps that tell how long a step takes; the first does not count
SLACK = 1.25  # so that the budget ends a stage, not a number of steps that was estimated a little too low
MEASURED, MEASURED_PROMPTS = 8, 64  # how often the held-out accuracy is measured on the way, on how many prompts
CURVES = ("reward", "length", "entropy")  # of the loop's own figures
POINTS = 200  # of a curve that are kept
Made = Method | Pipeline


def compare(
    policy: CausalPolicy,
    task: Task,
    methods: Mapping[str, Made],
    budget: Budget,
    *,
    seeds: int = 3,
    folder: Path | None = None,
    holdout: int | None = None,
    samples: int = 1,
    max_tokens: int | None = None,
    keep_length: bool = False,
    show: bool = True,
) -> Comparison:
    """Train copies of `policy` by each method with each seed, and compare them on the task's held-out problems.

    Args:
        methods: by the name to show. A pipeline's stages have equal parts of the budget.
        seeds: how many, from 0.
        folder: where all of it is kept; by default under `runs/`, the same for the same conditions.
        holdout: how many held-out problems; None for all. samples: completions of each; greedy with one.
        max_tokens: of a held-out completion, in place of the task's.
        keep_length: leave `steps` and `epochs` of the methods as they are, as a further limit. Otherwise the budget
            alone ends a stage, and its number of steps, on which schedules depend, is estimated from three steps.
    """
    _check(task, methods, budget, seeds, holdout, samples)
    drawn = replace(task.sampling, temperature=0.0 if samples == 1 else task.sampling.temperature or 1.0)
    if max_tokens is not None:
        drawn = replace(drawn, max_tokens=max_tokens)
    plan = _plan(policy, task, budget, holdout, samples, drawn)
    where = folder or Path("runs") / f"compare-{slug(task.name)}-{slug(str(budget))}-{digest(plan)[:8]}"
    jobs = _Jobs(policy, task, budget, where, holdout, samples, drawn, keep_length, show)
    with opened(where, plan):
        before = jobs.before()
        runs: dict[str, list[Run]] = {name: [] for name in methods}
        for seed in range(seeds):  # seed by seed: stopped early, every method has had as many
            for name, method in methods.items():
                runs[name].append(jobs.run(name, method, seed))
        found = judge(where, policy.name, task.name, budget, before, runs)
        compare_page.write(found)
    return found


class _Jobs:
    """The jobs of a comparison: each is read from its file, or done and written."""

    def __init__(
        self, policy: CausalPolicy, task: Task, budget: Budget, folder: Path, holdout: int | None, samples: int,
        sampling: Sampling, keep_length: bool, show: bool,
    ) -> None:  # fmt: skip
        self.policy, self.task, self.budget, self.folder = policy, task, budget, folder
        self.holdout, self.samples, self.sampling = holdout, samples, sampling
        self.keep_length, self.show = keep_length, show
        self.paces: dict[tuple[str, int], dict[str, float]] = {}  # by method and stage: what a step takes

    def before(self) -> np.ndarray:
        """`[prompts]`: the share of right completions of the model as it is."""
        file = self.folder / BEFORE
        if (row := read_row(file, OF_MODEL)) is None:
            self._say("evaluating the model as it is")
            row = {"correct": self._correct(self.policy)}
            write_text(file, json.dumps(row))
        return np.asarray(row["correct"])

    def run(self, name: str, method: Made, seed: int) -> Run:
        file = self.folder / f"{slug(name)}-seed{seed}.json"
        key = digest([method, self.keep_length])
        row = read_row(file, OF_JOB)
        if row is not None and row["key"] != key:
            self._say(f"{name}, seed {seed}: the method is another than the one that {file} is of; it runs again")
        if row is None or row["key"] != key:
            row = {"name": name, "seed": seed, "key": key, **self._train(name, method, seed)}
            write_text(file, json.dumps(row))
        return Run(seed, np.asarray(row["correct"]), row["curves"], row["seconds"], row["tokens"], row["rollouts"],
                   row["steps"])  # fmt: skip

    def _train(self, name: str, method: Made, seed: int) -> dict[str, Any]:
        trained = self._spend(name, method, seed)
        share = getattr(trained, self.budget.unit) / self.budget.amount
        if share < FULL and not self.keep_length:
            # its steps were cheaper than those that were timed: all methods must spend alike
            self._say(f"{name}, seed {seed}: took {100 * share:.0f}% of its budget, with steps to spare; once more")
            for place, pace in self.paces.items():
                if place[0] == name:
                    pace[self.budget.unit] *= share / SLACK
            trained = self._spend(name, method, seed)
        found = self._correct(trained.policy)
        self._say(f"{name}, seed {seed}: held-out accuracy {100 * float(np.mean(found)):.1f}%")
        return {
            "correct": found, "curves": _curves(trained), "seconds": trained.seconds, "tokens": trained.tokens,
            "rollouts": trained.rollouts, "steps": trained.steps,
        }  # fmt: skip

    def _spend(self, name: str, method: Made, seed: int) -> Trained:
        limited, total = self._limited(name, method)
        self._say(f"{name}, seed {seed}: training for {self.budget}")
        return train_stage(
            _fresh(self.policy), limited, self.task, seed=seed, evaluate=self._accuracy,
            every=max(1, total // MEASURED), show=self.show,
        )  # fmt: skip

    def _limited(self, name: str, method: Made) -> tuple[Made, int]:
        """The method within the budget, and about how many steps that is."""
        stages = stages_of(method)
        spending = [s for s in stages if s.online] if self.budget.unit == "rollouts" else list(stages)
        part = self.budget.part(len(spending))
        limited, total = [], 0
        for i, stage in enumerate(stages):
            within = stage
            if any(stage is s for s in spending):
                steps = None if self.keep_length else self._steps(name, i, stage, part)
                within = part.limit(stage, steps)
            limited.append(within)
            total += within.settings.steps or 0
        return (Pipeline(tuple(limited)) if isinstance(method, Pipeline) else limited[0]), total

    def _steps(self, name: str, place: int, stage: Method, part: Budget) -> int:
        """How many steps a stage takes for its part of the budget, from what a few of them took."""
        pace = self.paces.get((name, place))
        if pace is None:
            self._say(f"{name}: timing a step of {stage.name}")
            short = Budget(math.inf, "seconds").limit(stage, PROBE).with_settings(budget=None)
            tried = train_stage(_fresh(self.policy), short, self.task, seed=1_000_003)
            later = [row["seconds"] for row in tried.metrics[1:]] or [tried.seconds]
            pace = {
                "seconds": sum(later) / len(later),
                "tokens": tried.tokens / tried.steps,
                "rollouts": tried.rollouts / tried.steps,
            }
            self.paces[name, place] = pace
        return max(1, math.ceil(SLACK * part.amount / max(pace[part.unit], 1e-9)))

    def _correct(self, policy: CausalPolicy) -> list[float]:
        """`[prompts]`: the share of right completions of each held-out problem."""
        with Counter("evaluating", show=self.show) as progress:
            found = evaluate(
                engine_for(policy), policy.tokenizer, self.task, samples=self.samples, sampling=self.sampling,
                limit=self.holdout, progress=progress,
                likelihood=lambda trajectories: sequence_scores(policy, trajectories),
            )  # fmt: skip
        return [float(share) for share in found.correct.mean(axis=1)]

    def _accuracy(self, policy: CausalPolicy) -> dict[str, float]:
        """On the way, greedily on the first held-out problems."""
        limit = min(MEASURED_PROMPTS, self.holdout or MEASURED_PROMPTS)
        found = evaluate(
            engine_for(policy), policy.tokenizer, self.task, sampling=replace(self.sampling, temperature=0.0),
            limit=limit, likelihood=lambda trajectories: sequence_scores(policy, trajectories),
        )  # fmt: skip
        return {"accuracy": found.accuracy.value}

    def _say(self, text: str) -> None:
        if self.show:
            print(printable(text), file=sys.stderr, flush=True)


def _check(
    task: Task, methods: Mapping[str, Made], budget: Budget, seeds: int, holdout: int | None, samples: int
) -> None:
    """What can never work is refused before anything is trained."""
    if not methods:
        raise PosttrainError("compare: no method given; expected at least one, such as grpo")
    for label, value in (("seeds", seeds), ("holdout", holdout), ("samples", samples)):
        if value is not None and value < 1:
            raise PosttrainError(f"compare: {label} is {value}; expected at least 1")
    if not task.heldout:
        raise PosttrainError(f"compare: task {task.name} has no held-out problems; set heldout above 0")
    slugs: dict[str, str] = {}
    for name, method in methods.items():
        if slugs.setdefault(slug(name), name) != name:
            raise PosttrainError(f"compare: {slugs[slug(name)]!r} and {name!r} would share a file; rename one")
        stages = stages_of(method)
        for stage in stages:
            if stage.data in ("preferences", "feedback"):
                raise PosttrainError(
                    f"compare: {stage.name} learns from {stage.data}; a comparison trains on a task's prompts and "
                    f"worked solutions: give methods such as sft or grpo"
                )
        if budget.unit == "rollouts" and not any(stage.online for stage in stages):
            raise PosttrainError(
                f"compare: {name} samples nothing in training, so that {budget} do not limit it; give a budget of time "
                f"or tokens"
            )


def _plan(
    policy: CausalPolicy, task: Task, budget: Budget, holdout: int | None, samples: int, sampling: Sampling
) -> dict[str, Any]:
    """The conditions that all jobs of a folder share."""
    count = len(task.heldout[:holdout])
    problems = digest([[item.key for item in items] for items in (task.train, task.heldout)])
    return {
        "model": policy.name, "precision": str(policy.dtype).removeprefix("torch."), "task": task.name,
        "problems": problems, "budget": str(budget), "held-out prompts": count, "samples": samples,
        "max_tokens": sampling.max_tokens, "temperature": sampling.temperature,
    }  # fmt: skip


def _fresh(policy: CausalPolicy) -> CausalPolicy:
    """A copy to train."""
    other = CausalPolicy(copy.deepcopy(policy.model), policy.tokenizer, policy.name)
    other.model.requires_grad_(True)
    return other


def _curves(trained: Trained) -> dict[str, Curve]:
    """The held-out accuracy as it was measured, and the loop's own figures, smoothed."""
    found: dict[str, Curve] = {
        "accuracy": [
            {"step": p.step, "seconds": p.seconds, "tokens": p.tokens, "rollouts": p.rollouts,
             "value": p.figures["accuracy"]}
            for p in trained.curve
        ]
    }  # fmt: skip
    spent = _spent(trained.metrics)
    for name in CURVES:
        rows = [i for i, row in enumerate(trained.metrics) if math.isfinite(row.get(name, math.nan))]
        window = min(51, max(5, len(rows) // 20 | 1))
        means = rolling_mean([trained.metrics[i][name] for i in rows], window)
        kept = [(rows[j], means[j]) for j in spread(len(rows), POINTS)]
        if kept:
            found[name] = [{**spent[i], "value": float(value or 0.0)} for i, value in kept]
    return found


def _spent(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    """What had been spent after each step. The loop counts tokens and rollouts from the start of each stage."""
    found, seconds = [], 0.0
    totals, before, last = {"tokens": 0.0, "rollouts": 0.0}, {"tokens": 0.0, "rollouts": 0.0}, -1.0
    for step, row in enumerate(metrics, 1):
        if row.get("tokens", 0.0) < last:
            before = dict(totals)
        last = row.get("tokens", 0.0)
        seconds += row.get("seconds", 0.0)
        for key in totals:
            totals[key] = before[key] + row[key] if key in row else totals[key]
        found.append({"step": float(step), "seconds": seconds, **totals})
    return found
