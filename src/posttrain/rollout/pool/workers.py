"""Workers of one kind on a Ray cluster that take jobs from one queue; one that dies is replaced, its job done again.

A thread of this process stands behind each worker: it makes the worker, hands it the next job and waits. So a job goes
to whoever is free, and nothing but the order in which jobs are begun depends on who that is.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from contextlib import suppress
from dataclasses import dataclass, field
from queue import PriorityQueue
from typing import Any

from posttrain.rollout.pool.cluster import ray_package
from posttrain.trajectory import PosttrainError

TRIES = 3  # how often a job, or the making of a worker, may end with the death of the worker
WAITING = 120.0  # seconds after which it is told that a worker has not started

Call = Callable[[Any], Any]  # from a worker (an actor's handle) to the reference of its answer


@dataclass(order=True)
class _Job:
    """number: its place in the queue, kept when it is done again."""

    number: int
    call: Call | None = field(compare=False, default=None)
    future: Future[Any] = field(compare=False, default_factory=Future)
    deaths: int = field(compare=False, default=0)


def last_line(error: Exception | None) -> str:
    """The end of Ray's long reports, which is the reason, without colours."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().splitlines() or [""]
    return " ".join(lines[-1].split())[:300]


class Workers:
    """A pool of actors.

    make: a fresh actor; it answers `ready`, once what it needs is there. what: what errors call one of them.
    say: told of each one that died.
    """

    def __init__(
        self, make: Callable[[], Any], count: int, what: str, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.make, self.what, self.say = make, what, say
        self.replaced = 0
        self._jobs: PriorityQueue[_Job] = PriorityQueue()
        self._numbers = itertools.count()
        self._closed = False
        self._lock = threading.Lock()
        self._actors: list[Any] = [None] * count
        self._serving = count
        self._threads = [threading.Thread(target=self._serve, args=(i,), daemon=True) for i in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, call: Call) -> Future[Any]:
        """Have a worker do something; its answer, or PosttrainError where workers died of it again and again."""
        job = _Job(next(self._numbers), call)
        with self._lock:
            if self._closed or not self._serving:
                job.future.set_exception(self._gone())
            else:
                self._jobs.put(job)
        return job.future

    def close(self) -> None:
        """End all workers; jobs that are not done are cancelled."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        for _ in self._threads:
            self._jobs.put(_Job(-1))
        ray = ray_package()
        for actor in self._actors:
            if actor is not None:
                ray.kill(actor)
        for thread in self._threads:
            thread.join(10)
        self._cancel_waiting()

    # -- a thread ------------------------------------------------------------------------------------------------------

    def _serve(self, place: int) -> None:
        failures = 0
        error: Exception | None = None
        while failures < TRIES and not self._closed:
            try:
                actor = self._made(place)
            except Exception as failed:  # it cannot be made: out of memory, or other packages there
                failures, error = failures + 1, failed
                continue
            failures = 0
            if not self._work(actor):
                return
        with self._lock:
            self._serving -= 1
            if self._closed:
                return
            if self._serving:
                self.say(f"a {self.what} cannot be started; {self._serving} are left: {last_line(error)}")
                return
        self._fail_waiting(error)

    def _made(self, place: int) -> Any:
        ray = ray_package()
        actor = self._actors[place] = self.make()
        ready = actor.ready.remote()
        if not ray.wait([ready], timeout=WAITING)[0]:
            self.say(f"a {self.what} has not started in {WAITING:.0f} s; the cluster may have no free cores for it")
        ray.get(ready)
        return actor

    def _work(self, actor: Any) -> bool:
        """Do jobs until there are no more (False) or the worker has died (True)."""
        ray = ray_package()
        while True:
            job = self._jobs.get()
            if job.call is None:
                return False
            if not job.deaths and not job.future.set_running_or_notify_cancel():
                continue
            try:
                job.future.set_result(ray.get(job.call(actor)))
            except ray.exceptions.RayTaskError as error:  # what the work itself raised
                job.future.set_exception(error.cause if isinstance(error.cause, Exception) else error)
            except ray.exceptions.RayError as died:
                if self._closed:
                    job.future.set_exception(CancelledError())
                    return False
                with suppress(Exception):  # where it was out of reach rather than dead
                    ray.kill(actor)
                self._again(job, died)
                return True
            except Exception as error:
                job.future.set_exception(error)

    def _again(self, job: _Job, died: Exception) -> None:
        job.deaths += 1
        self.replaced += 1
        if job.deaths < TRIES:
            self.say(f"a {self.what} died; another takes its place and does its work again")
            self._jobs.put(job)
            return
        job.future.set_exception(
            PosttrainError(f"{job.deaths} {self.what}s died over the same work: {last_line(died)}")
        )

    # -- the end -------------------------------------------------------------------------------------------------------

    def _gone(self) -> PosttrainError:
        return PosttrainError(f"there is no {self.what} any more: the pool is closed, or none could be made")

    def _fail_waiting(self, error: Exception | None) -> None:
        """No worker can be made: what waits would wait for ever."""
        while not self._jobs.empty():
            job = self._jobs.get()
            if job.call is not None and (job.deaths or job.future.set_running_or_notify_cancel()):
                job.future.set_exception(PosttrainError(f"no {self.what} can be started: {last_line(error)}"))

    def _cancel_waiting(self) -> None:
        while not self._jobs.empty():
            job = self._jobs.get()
            if job.call is not None and not job.future.cancel():
                with suppress(Exception):
                    job.future.set_exception(CancelledError())
