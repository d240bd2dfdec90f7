"""Compressing one model by several methods with several calibration draws, and judging them on the same text.

Every method and seed is a job of its own, kept as a file in the comparison's folder: a comparison that was stopped goes
on with the job it was at, and methods or seeds that are added later join what is there.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.compress.calibrate import Texts
from posttrain.compress.experts import unfuse
from posttrain.compress.measure import decoding_rate, model_bytes
from posttrain.compress.method import Calibrated, Compression
from posttrain.compress.pipeline import check
from posttrain.compress.policy import check_float, compressed_copy
from posttrain.compress.stacks import check_patterns
from posttrain.compress.transforms.transform import Transform
from posttrain.evaluation.evaluate import evaluate
from posttrain.evaluation.perplexity import Predictions, predict
from posttrain.evaluation.task import Task
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.engine_choice import engine_for
from posttrain.studies import compressed_page
from posttrain.studies.compare import BEFORE
from posttrain.studies.comparison_folder import opened, read_row, slug
from posttrain.studies.compressed_comparison import Before, CompressedComparison, Run, judge
from posttrain.studies.fingerprint import digest
from posttrain.terminal import Counter, printable
from posttrain.training.checkpoint import write_text
from posttrain.training.scoring import sequence_scores
from posttrain.training.values import checked_seed
from posttrain.trajectory import Group, PosttrainError

OF_MODEL = ("loss", "tokens", "correct", "size", "rate")  # what the files of jobs hold
OF_JOB = ("key", "loss", "kl", "correct", "bits", "size", "seconds", "rate")
TIMED = 16  # tokens decoded to tell the rate


def compare_compressed(
    policy: CausalPolicy,
    methods: Mapping[str, Compression],
    texts: Texts,
    *,
    task: Task | None = None,
    seeds: int = 3,
    folder: Path | None = None,
    holdout: int | None = None,
    skip: Sequence[str] = (),
    show: bool = True,
) -> CompressedComparison:
    """Compress copies of `policy` by each method with each seed, and compare what they predict and how large they are.

    Args:
        methods: by the name to show, each with the amount of text that it is calibrated on.
        texts: what is calibrated on, drawn by seed, and what all are measured on.
        task: held-out problems to be solved as well, greedily; holdout: only the first of them.
        seeds: calibration draws, from 0. folder: where all of it is kept; by default one under `runs/`, the same for
            the same conditions. skip: layers that no method compresses.
    """
    _check(policy, methods, task, seeds, holdout, skip)
    length = max(method.calibration.length for method in methods.values())
    windows = texts.unseen(policy, length)
    jobs = _Jobs(policy, texts, windows, task, holdout, tuple(skip), show)
    plan = jobs.plan()
    where = folder or Path("runs") / f"compare-{slug(policy.name)}-compressed-{digest(plan)[:8]}"
    jobs.folder = where
    with opened(where, plan):
        before = jobs.before()
        runs: dict[str, list[Run]] = {name: [] for name in methods}
        for seed in range(seeds):  # seed by seed: stopped early, every method has had as many
            for name, method in methods.items():
                runs[name].append(jobs.run(name, method, seed))
        found = judge(
            where, policy.name, texts.measured_on, texts.calibrated_on, task.name if task is not None else None,
            before, runs,
        )  # fmt: skip
        compressed_page.write(found)
    return found


class _Jobs:
    """The jobs of a comparison: each is read from its file, or done and written."""

    folder: Path

    def __init__(
        self, policy: CausalPolicy, texts: Texts, windows: Sequence[Group], task: Task | None, holdout: int | None,
        skip: tuple[str, ...], show: bool,
    ) -> None:  # fmt: skip
        self.policy, self.texts, self.windows = policy, texts, windows
        self.task, self.holdout, self.skip, self.show = task, holdout, skip, show

    def plan(self) -> dict[str, Any]:
        """The conditions that all jobs of a folder share. Methods, their arguments and how much they are calibrated on
        are no condition.
        """
        probe = self.texts.batches(self.policy, Calibrated(samples=8, length=128), 0)  # another source gives others
        return {
            "model": self.policy.name, "precision": str(self.policy.dtype).removeprefix("torch."),
            "calibration": [self.texts.calibrated_on, digest([batch["input_ids"] for batch in probe])],
            "text": digest([t.tokens for group in self.windows for t in group.trajectories]),
            "windows": len(self.windows), "skipped": list(self.skip),
            "task": None if self.task is None else self.task.name,
            "problems": None if self.task is None else digest([item.key for item in self.task.heldout[: self.holdout]]),
        }  # fmt: skip

    def before(self) -> Before:
        file = self.folder / BEFORE
        if (row := read_row(file, OF_MODEL)) is None:
            self._say("measuring the model as it is")
            found = self._predict(self.policy, None)
            row = {
                "loss": found.loss.tolist(), "tokens": found.tokens.tolist(), "correct": self._correct(self.policy),
                "size": model_bytes(self.policy.model), "rate": decoding_rate(self.policy, TIMED),
            }  # fmt: skip
            write_text(file, json.dumps(row))
        return Before(
            np.asarray(row["loss"]), np.asarray(row["tokens"]), _array(row["correct"]),
            8.0 * self.policy.dtype.itemsize, row["size"], row["rate"],
        )  # fmt: skip

    def run(self, name: str, method: Compression, seed: int) -> Run:
        file = self.folder / f"{slug(name)}-seed{seed}.json"
        key = digest(method)
        row = read_row(file, OF_JOB)
        if row is not None and row["key"] != key:
            self._say(f"{name}, seed {seed}: the method is another than the one that {file} is of; it runs again")
        if row is None or row["key"] != key:
            row = {"name": name, "seed": seed, "key": key, **self._compress(name, method, seed)}
            write_text(file, json.dumps(row))
        return Run(
            seed, np.asarray(row["loss"]), np.asarray(row["kl"]), _array(row["correct"]), row["bits"], row["size"],
            row["seconds"], row["rate"],
        )  # fmt: skip

    def _compress(self, name: str, method: Compression, seed: int) -> dict[str, Any]:
        batches = self.texts.batches(self.policy, method.calibration, seed)
        with Counter(f"{name}, seed {seed}: blocks", "blocks", show=self.show) as progress, _called(name):
            small = compressed_copy(self.policy, method, batches, skip=self.skip, seed=seed, progress=progress)
        found = self._predict(small, self.policy)
        assert found.kl is not None
        if not np.isfinite(found.loss).all():
            raise PosttrainError(f"{name}, seed {seed}: what the compressed model predicts is not finite; leave it out")
        done = small.compression
        self._say(f"{name}, seed {seed}: perplexity {found.perplexity:.4g} at {done.bits:.3f} bits a weight")
        return {
            "loss": found.loss.tolist(), "kl": found.kl.tolist(), "correct": self._correct(small), "bits": done.bits,
            "size": model_bytes(small.model), "seconds": done.seconds, "rate": decoding_rate(small, TIMED),
        }  # fmt: skip

    def _predict(self, policy: CausalPolicy, of: CausalPolicy | None) -> Predictions:
        with Counter("measuring", "windows", show=self.show) as progress:
            return predict(policy, self.windows, of=of, progress=progress)

    def _correct(self, policy: CausalPolicy) -> list[float] | None:
        """`[prompts]`: whether each held-out problem is solved, greedily."""
        if self.task is None:
            return None
        with Counter("evaluating", show=self.show) as progress:
            found = evaluate(
                engine_for(policy), policy.tokenizer, self.task, limit=self.holdout, progress=progress,
                sampling=replace(self.task.sampling, temperature=0.0),
                likelihood=lambda trajectories: sequence_scores(policy, trajectories),
            )  # fmt: skip
        return [float(share) for share in found.correct.mean(axis=1)]

    def _say(self, text: str) -> None:
        if self.show:
            print(printable(text), file=sys.stderr, flush=True)


def _check(
    policy: CausalPolicy, methods: Mapping[str, Compression], task: Task | None, seeds: int, holdout: int | None,
    skip: Sequence[str],
) -> None:  # fmt: skip
    """What can never work is refused before anything is compressed."""
    if not methods:
        raise PosttrainError("compare: no method given; expected at least one, such as gptq")
    for label, value in (("seeds", seeds), ("holdout", holdout)):
        if value is not None and value < 1:
            raise PosttrainError(f"compare: {label} is {value}; expected at least 1")
    checked_seed(seeds - 1, "compare: the last seed")
    check_float(policy)
    if task is not None and not task.heldout:
        raise PosttrainError(f"compare: task {task.name} has no held-out problems; set heldout above 0")
    slugs: dict[str, str] = {}
    for name in methods:
        if slugs.setdefault(slug(name), name) != name:
            raise PosttrainError(f"compare: {slugs[slug(name)]!r} and {name!r} would share a file; rename one")
    check_patterns(policy.base, skip)
    for name, method in methods.items():
        with _called(name):
            check(policy.base, method, skip)
            _suits(policy, method)


def _suits(policy: CausalPolicy, method: Compression) -> None:
    """PosttrainError where a method's transforms do not fit the architecture: they are tried on a copy, since what they
    need is seen in no other way.
    """
    tried = [t for t in method.transforms if type(t).apply_to_model is not Transform.apply_to_model]
    if tried:
        model: Any = copy.deepcopy(policy.base).cpu().requires_grad_(False).eval()
        unfuse(model)
        for transform in tried:
            transform.apply_to_model(model)


@contextmanager
def _called(name: str) -> Iterator[None]:
    """What is refused within says which of the methods it is about."""
    try:
        yield
    except PosttrainError as error:
        told = str(error)
        raise PosttrainError(told if told.startswith(f"{name}:") else f"{name}: {told}") from error


def _array(values: list[float] | None) -> np.ndarray | None:
    return None if values is None else np.asarray(values)
