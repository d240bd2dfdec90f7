"""A Ray cluster: one that is there, joined, or one on this machine for as long as a run lasts."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.processes import here
from posttrain.trajectory import PosttrainError

LOOPBACK = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # where it is 0, on Linux too, a cluster is of this machine alone
TRIES = 3  # to begin a cluster on a machine that is busy
QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}  # no reports, no advice


@dataclass(frozen=True, slots=True)
class Cluster:
    """Which cluster, and what a run takes of it.

    address: `local` begins one on this machine, on its loopback interface; `auto` joins the one that this machine
        belongs to; else `HOST:PORT` of the head node, or `ray://HOST:PORT`.
    workers: processes that draw completions, with `cpus` cores (and as many threads) and `gpus` of each.
    reward_workers: processes that score completions; 0 scores them in the trainer.
    piece: prompts that a worker is given at a time; None: so many that they make about 32 completions. A result never
        depends on who drew a piece; up to the rounding of sums, it does not depend on the pieces either.
    working_dir: a folder that Ray copies to every node, where the code of rewards and environments is not installed.
    """

    address: str = "local"
    workers: int = 2
    cpus: int = 1
    gpus: float = 0.0
    reward_workers: int = 0
    piece: int | None = None
    working_dir: str | None = None

    def __post_init__(self) -> None:
        for name, low in (("workers", 1), ("cpus", 1), ("gpus", 0), ("reward_workers", 0), ("piece", 1)):
            value = getattr(self, name)
            if value is not None and not value >= low:
                raise PosttrainError(f"cluster: {name} is {value}; expected at least {low}")


def ray_package() -> Any:
    """The package `ray`."""
    try:
        import ray

        ray.init  # noqa: B018 - a folder that happens to be called so has none
    except (ImportError, AttributeError) as error:
        raise PosttrainError(
            "a cluster needs Ray, which is not installed: pip install 'posttrain[ray]', on all of its nodes"
        ) from error
    return ray


@contextmanager
def joined(cluster: Cluster) -> Iterator[None]:
    """Be part of a cluster inside the block. A program that has joined one already stays in that.

    Raises:
        PosttrainError: Ray is not installed, there is no such cluster, or it has fewer cores than the run takes.
    """
    if here().several:
        raise PosttrainError(
            f"{here().world} processes train together, each of which draws its share of the completions: leave out "
            f"cluster, or train in one process"
        )
    with _environment(cluster):
        ray = ray_package()
    if ray.is_initialized():
        _check_room(ray, cluster)
        yield
        return
    cores = cluster.workers * cluster.cpus + cluster.reward_workers
    options: dict[str, Any] = {"address": cluster.address}
    if cluster.address == "local":
        options |= {"num_cpus": max(cores, os.cpu_count() or 1), "include_dashboard": False}
    if cluster.working_dir is not None:
        options["runtime_env"] = {"working_dir": cluster.working_dir}
    with _signals_kept(), _environment(cluster):
        _begin(ray, options)
    try:
        _check_room(ray, cluster)
        yield
    finally:
        ray.shutdown()


def _begin(ray: Any, options: dict[str, Any]) -> None:
    """`ray.init`; on this machine again where it took longer than the half minute that Ray allows for it."""
    for attempt in range(TRIES):
        try:
            ray.init(**options, log_to_driver=False, logging_level=logging.CRITICAL)
            return
        except Exception as error:  # what Ray raises differs by the kind of address, and may run over many lines
            ray.shutdown()
            if options["address"] == "local" and "timed out" in str(error) and attempt + 1 < TRIES:
                continue
            reason = " ".join(str(error).split())[:200]
            raise PosttrainError(
                f"cannot join the Ray cluster at {options['address']!r}: {reason}; start one with `ray start --head` "
                f"and give its address, or set address: local"
            ) from error


def _check_room(ray: Any, cluster: Cluster) -> None:
    there = ray.cluster_resources()
    needed = {"CPU": cluster.workers * cluster.cpus + cluster.reward_workers, "GPU": cluster.workers * cluster.gpus}
    for kind, count in needed.items():
        if count > there.get(kind, 0):
            raise PosttrainError(
                f"the Ray cluster has {there.get(kind, 0):g} {kind}s and the run takes {count:g} ({cluster.workers} "
                f"workers of {cluster.cpus} CPUs and {cluster.gpus:g} GPUs, {cluster.reward_workers} reward workers); "
                f"add nodes, or set fewer workers"
            )


@contextmanager
def _environment(cluster: Cluster) -> Iterator[None]:
    """What Ray reads when it is imported and begun. Workers on this machine import what this process can import."""
    wanted = dict(QUIET)
    if cluster.address == "local":
        wanted |= {LOOPBACK: "0", "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Ray answers TERM itself once it is initialized; a run stops with a checkpoint instead."""
    try:
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        yield
    finally:
        for number, handler in before.items():
            try:
                signal.signal(number, handler)
            except (ValueError, TypeError):  # not in the main thread, or not Python's own
                break
