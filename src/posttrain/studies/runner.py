"""Running the arms of studies: one job for each arm and seed, each kept as a file, so that only what is missing runs.

Jobs are known by the arm's key (its arguments and code), the seed and `quick`: arms that studies share run once, and
an arm whose part was edited runs again. What is kept lies in the cache folder under `studies/`.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import platform
import random
import time
import traceback
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from posttrain.lab.haste import hasty
from posttrain.models.load import cache_folder
from posttrain.studies import registry
from posttrain.studies.study import Measured, Study, job_key
from posttrain.studies.workers import work_through
from posttrain.terminal import one_line
from posttrain.training.checkpoint import write_text
from posttrain.trajectory import PosttrainError

QUICK_SEEDS = 1
PACKAGES = ("posttrain", "torch", "transformers", "numpy")


@dataclass(frozen=True, slots=True)
class Job:
    """One arm with one seed. module: what a fresh process imports to find the study."""

    module: str
    study: str
    arm: str
    seed: int
    quick: bool
    key: str

    def __str__(self) -> str:
        return f"{self.study}: {self.arm}, seed {self.seed}"


@dataclass(frozen=True, slots=True)
class Record:
    """What a job found, and when, where and with which versions it ran."""

    measured: Measured
    date: str
    machine: str
    versions: dict[str, str]


@dataclass(frozen=True)
class Plan:
    """A study and its jobs: `jobs[arm]` has one job a seed."""

    entry: registry.Entry
    study: Study
    quick: bool
    jobs: dict[str, list[Job]]

    @property
    def keys(self) -> set[str]:
        return {job.key for jobs in self.jobs.values() for job in jobs}

    def records(self) -> dict[str, list[Record]] | None:
        """What every job found, by arm in the order of the seeds; None while one is missing."""
        found: dict[str, list[Record]] = {}
        for arm, jobs in self.jobs.items():
            runs = [record for job in jobs if (record := kept(job.key)) is not None]
            if len(runs) < len(jobs):
                return None
            found[arm] = runs
        return found


def plan(entry: registry.Entry, seeds: int | None = None, quick: bool = False) -> Plan:
    """What a study needs. seeds: in place of its own number; with `quick`, one seed unless it says otherwise."""
    study = entry.function()
    count = seeds if seeds is not None else QUICK_SEEDS if quick else study.seeds
    if count < 1:
        raise PosttrainError(f"seeds is {count}; expected at least 1")
    module = entry.function.__module__
    identities = {name: arm.identity for name, arm in study.arms.items()}
    jobs = {
        name: [Job(module, entry.name, name, seed, quick, job_key(identity, seed, quick)) for seed in range(count)]
        for name, identity in identities.items()
    }
    return Plan(entry, study, quick, jobs)


def missing(plans: Sequence[Plan]) -> list[Job]:
    """The jobs that have no result yet, each key once, study by study and seed by seed."""
    found: dict[str, Job] = {}
    for each in plans:
        for jobs in zip(*each.jobs.values(), strict=True):
            for job in jobs:
                if job.key not in found and kept(job.key) is None:
                    found[job.key] = job
    return list(found.values())


def models_first(jobs: Sequence[Job], plans: Sequence[Plan]) -> list[Job]:
    """The jobs in another order: first one of each model, which makes it, so that few wait while another makes theirs.

    Quick jobs take no longer than making a model; for others it matters more that one study is done after the other.
    """
    arguments = {(each.entry.name, name): arm.arguments for each in plans for name, arm in each.study.arms.items()}
    first: dict[str, Job] = {}
    for job in jobs:
        given = arguments[job.study, job.arm]
        first.setdefault(repr([given.get(name) for name in ("model", "spec", "preset", "teacher")]), job)
    return [*first.values(), *(job for job in jobs if job not in first.values())]


def forget(plans: Sequence[Plan]) -> None:
    """Remove what the plans' jobs found before, so that they run anew."""
    for key in set().union(*(each.keys for each in plans)):
        _file(key).unlink(missing_ok=True)


def run(
    jobs: Sequence[Job], workers: int, started: Callable[[Job], None] = lambda job: None
) -> Generator[tuple[Job, str | None]]:
    """Run jobs in worker processes; gives each as it is done, with what went wrong in one line.

    What a job finds is written by its own process: killed at any moment, nothing that is done is lost.
    """
    return work_through(jobs, carry_out, min(workers, len(jobs)), started)


def carry_out(job: Job) -> str | None:
    """Run one job and keep what it found; returns what went wrong."""
    from filelock import FileLock

    try:
        locks = _file(job.key).parent / "locks"
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(str(locks / job.key)):
            if kept(job.key) is None:  # else another process did it meanwhile
                _keep(job, _measure(job))
        return None
    except PosttrainError as error:
        return one_line(str(error))
    except Exception as error:
        where = _file(job.key).with_suffix(".error")
        where.write_text(traceback.format_exc(), encoding="utf-8")
        return one_line(f"{type(error).__name__}: {error} (traceback: {where})")


def kept(key: str) -> Record | None:
    """What the job of that key found, if it has been run."""
    try:
        row = json.loads(_file(key).read_text(encoding="utf-8"))
        return Record(Measured(**row["measured"]), row["date"], row["machine"], row["versions"])
    except (OSError, ValueError, TypeError, KeyError):
        return None


def _measure(job: Job) -> Measured:
    importlib.import_module(job.module)
    arm = registry.known(job.study).function().arms[job.arm]
    if job_key(arm.identity, job.seed, job.quick) != job.key:
        raise PosttrainError("its code was edited while the study ran, or differs between processes; start it again")
    # what is random in an arm is made of its seed; this makes a forgotten generator of a library repeatable too
    random.seed(job.seed)
    np.random.seed(job.seed)  # noqa: NPY002
    torch.manual_seed(job.seed)
    begun = time.perf_counter()
    with hasty(job.quick):  # a quick job need not wait for good models, and no other is ever given a hasty one
        measured = arm.run(job.seed, job.quick, **arm.arguments)
    if not isinstance(measured, Measured):
        raise PosttrainError(f"the arm returned {type(measured).__name__}; expected Measured")
    if not measured.seconds:
        measured.seconds = time.perf_counter() - begun
    return measured


def _keep(job: Job, measured: Measured) -> None:
    row = {
        "job": dataclasses.asdict(job),
        "measured": dataclasses.asdict(measured),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }
    write_text(_file(job.key), json.dumps(row))


def machine() -> str:
    """The hardware that a job computes on, in words: `1 thread of an Intel Xeon`, or the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    processor = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).is_file():
        lines = (line.split(":", 1) for line in cpuinfo.read_text(encoding="utf-8").splitlines() if ":" in line)
        processor = {name.strip(): text.strip() for name, text in lines}.get("model name", processor)
    threads = torch.get_num_threads()
    return f"{threads} thread{'s' if threads != 1 else ''} of {processor}"


def _file(key: str) -> Path:
    return cache_folder() / "studies" / f"{key}.json"
