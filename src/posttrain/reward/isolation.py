"""Rewards called in processes of their own: one that hangs, crashes or eats memory costs its score, not the training.

A *warden* (`warden.py`) stands between: a process that never calls a user's code, forks workers that do, and ends those
that take too long. It starts with the first completion to score; a worker in place of an ended one is a fork of it, and
so costs no import of the package.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import socket
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from posttrain.reward.fault import Fault
from posttrain.reward.names import unknown
from posttrain.reward.scorers import Answer, Scorer
from posttrain.trajectory import Finish, PosttrainError, Prompt

PIECE = 16  # calls that a worker is given at a time: few enough to share out, enough to make quick ones cheap
UNITS = {"": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "kb": 10**3, "mb": 10**6, "gb": 10**9}
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


@dataclass(frozen=True, slots=True)
class Limits:
    """What an isolated call may use.

    timeout: seconds that one call may take (the first of a worker loads what the component imports late).
    memory: bytes of address space that a worker may take beyond what it starts with; None for no limit.
    workers: processes at most.
    """

    timeout: float = 10.0
    memory: int | None = 2 << 30
    workers: int = field(default_factory=lambda: min(8, os.cpu_count() or 1))


@dataclass(frozen=True, slots=True)
class Setup:
    """What the warden is told first. scorers: for each component its name, what to call (a verifier's name, an import
    path, or a pickled callable, which only workers load), its arguments, and which of `tokens` and `finish` it takes.
    """

    limits: Limits
    path: list[str]
    scorers: list[tuple[str, str | bytes, dict[str, Any], tuple[str, ...]]]


def limits_from(spec: Any) -> Limits | None:
    """Limits as a recipe says them: true, false, or `{timeout: 5, memory: 2GiB, workers: 4}`; None for no isolation."""
    if spec is None or spec is False:
        return None
    if spec is True:
        return Limits()
    if not isinstance(spec, Mapping):
        raise PosttrainError(f"reward: isolate is {spec!r}; expected true, or such as {{timeout: 5, memory: 2GiB}}")
    given = dict(spec)
    for key in given:
        if key not in ("timeout", "memory", "workers"):
            raise unknown("setting of isolate", key, ("timeout", "memory", "workers"))
    for key, whole in (("timeout", False), ("workers", True)):
        value = given.get(key, 1)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float) or not value > 0:
            expected = "a number of processes" if whole else "seconds"
            raise PosttrainError(f"reward: isolate: {key} is {value!r}; expected {expected} above 0")
    if given.get("memory") is not None:
        given["memory"] = _bytes(given["memory"])
    return Limits(**given)


def _bytes(memory: Any) -> int:
    found = re.fullmatch(r"([\d.]+)\s*([kmg]i?b)?", str(memory).strip().lower())
    size = 0
    if found is not None and found[1].count(".") <= 1 and found[1] != ".":
        size = int(float(found[1]) * UNITS[found[2] or ""])
    if size <= 0 or isinstance(memory, bool):
        raise PosttrainError(f"reward: isolate: memory is {memory!r}; expected bytes, or such as 500MB, 2GiB, or null")
    return size


class Isolated:
    """A component that is called in a worker. Alone it raises what went wrong; `batch` gives faults in their places."""

    def __init__(self, sandbox: Sandbox, number: int, name: str, inner: str) -> None:
        self.sandbox, self.number, self.name, self.inner = sandbox, number, name, inner

    def __repr__(self) -> str:
        return f"isolated({self.inner})"

    def __call__(self, completion: str, prompt: Prompt, *, tokens: int = 0, finish: Finish = "none") -> float:
        (found,) = self.batch([Answer(prompt, completion, tokens, finish)])
        if isinstance(found, Fault):
            raise IsolatedError(found.message)
        return found

    def batch(self, answers: Sequence[Answer]) -> list[float | Fault]:
        """A number or a fault for each answer, in their order."""
        return self.sandbox.call(self.number, answers)


class IsolatedError(Exception):
    """What went wrong in an isolated call, where it is called by itself."""


class Sandbox:
    """The warden of a reward's components, as the trainer sees it; copies of a reward share it."""

    def __init__(self, limits: Limits) -> None:
        if not hasattr(os, "fork"):
            raise PosttrainError("reward: isolate needs a system that can fork processes, as Linux; set isolate: false")
        if limits.memory is not None and not sys.platform.startswith("linux"):
            raise PosttrainError(f"reward: isolate: memory cannot be limited on {sys.platform}; set memory: null")
        self.setup = Setup(limits, [p or os.getcwd() for p in sys.path], [])  # noqa: PTH109 (as text)
        self._pipe: Connection | None = None
        self._end: Callable[[], object] = lambda: None

    def __deepcopy__(self, memo: dict[int, Any]) -> Sandbox:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _restored, (self.setup,)  # elsewhere it has a warden of its own

    def admit(self, name: str, source: str | Scorer, arguments: dict[str, Any], keywords: tuple[str, ...]) -> Isolated:
        """Take a component in: a name or an import path with its arguments, or a callable."""
        self.setup.scorers.append((name, _pickled(name, source) if callable(source) else source, arguments, keywords))
        inner = repr(source) if callable(source) else source
        return Isolated(self, len(self.setup.scorers) - 1, name, inner)

    def call(self, number: int, answers: Sequence[Answer]) -> list[float | Fault]:
        """Have one component judge answers, a piece at a time; returns when all are judged.

        Raises PosttrainError where no worker can load the component.
        """
        found: list[float | Fault | None] = [None] * len(answers)
        starts = list(range(0, len(answers), PIECE))
        if not starts:
            return []
        for _ in range(2):  # a warden that was killed is replaced once
            try:
                self._exchange(number, answers, starts, found)
                return [outcome for outcome in found if outcome is not None]
            except (EOFError, ConnectionError):
                self.close()
        raise PosttrainError(
            "reward: the process that guards the isolated rewards ended twice (out of memory, perhaps); free memory, "
            "or set fewer workers"
        )

    def _exchange(
        self, number: int, answers: Sequence[Answer], starts: list[int], found: list[float | Fault | None]
    ) -> None:
        """Send the pieces that are still to do and fill in what comes back; `starts` keeps what is left."""
        pieces = [(start, answers[start : start + PIECE]) for start in starts]
        try:
            request = pickle.dumps([(s, len(p), pickle.dumps((number, list(p)))) for s, p in pieces])
        except Exception as error:
            raise PosttrainError(
                f"reward {self.setup.scorers[number][0]}: a prompt cannot be sent to another process ({error}); keep "
                f"plain values in its meta, or set isolate: false"
            ) from error
        pipe = self._open()
        try:
            pipe.send_bytes(request)
            while starts:
                start, outcomes = json.loads(pipe.recv_bytes())
                if isinstance(outcomes, str):
                    raise PosttrainError(outcomes)
                for i, (value, kind, message) in enumerate(outcomes, start):
                    found[i] = float(value) if kind is None else Fault(kind, message)
                starts.remove(start)
        except (EOFError, ConnectionError):
            raise
        except BaseException:  # an interrupt: what would still come back belongs to nobody
            self.close()
            raise

    def _open(self) -> Connection:
        """The pipe to the warden, which is started where there is none."""
        if self._pipe is None:
            ours, theirs = socket.socketpair()
            with theirs:
                command = [sys.executable, "-m", "posttrain.reward.warden", str(theirs.fileno())]
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=2,  # what components print is no output of the program
                    pass_fds=[theirs.fileno()],
                    start_new_session=True,  # Ctrl-C asks the trainer to stop, and it still scores this step
                    env={**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(self.setup.path)},
                )
            self._pipe = Connection(ours.detach())
            self._end = weakref.finalize(self, _end, process, self._pipe)  # at the latest when Python ends
            self._pipe.send_bytes(pickle.dumps(self.setup))
        return self._pipe

    def close(self) -> None:
        """End the warden, and with it its workers; the next call starts another."""
        self._end()
        self._pipe = None


def _end(process: subprocess.Popen[bytes], pipe: Connection) -> None:
    pipe.close()  # the warden ends when its pipe does
    try:
        process.wait(5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _restored(setup: Setup) -> Sandbox:
    sandbox = Sandbox(setup.limits)
    sandbox.setup.scorers.extend(setup.scorers)
    return sandbox


def _pickled(name: str, function: Scorer) -> bytes:
    """A callable, unless another process could not find it."""
    try:
        if getattr(function, "__module__", None) == "__main__":
            raise AttributeError("it is defined in the program that was started")
        return pickle.dumps(function)
    except Exception as error:
        raise PosttrainError(
            f"reward {name}: {error}; an isolated reward is loaded by another process: put it into a module of its own "
            f"and name it package.module:function or file.py:function"
        ) from error
