"""The process that guards isolated rewards: `python -m posttrain.reward.warden FD`, started by `isolation.Sandbox`.

It takes pieces of calls from the trainer, gives them to workers (forks of itself that load the user's code) and watches
the clock. A worker that takes too long is killed with all processes it started; one that dies or runs out of memory is
replaced. The call at fault gets a `Fault`, the calls behind it go on in the next worker. Workers answer in JSON, so
that nothing they write can harm this process.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import signal
import sys
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn

import torch

from posttrain.reward.fault import Fault, FaultKind, ending
from posttrain.reward.isolation import Setup
from posttrain.reward.scorers import evaluate, scorer_from
from posttrain.reward.seeding import seed_by_call
from posttrain.trajectory import PosttrainError

LOADING_SECONDS = 300.0  # for the imports of the user's code, in a fresh worker
KILL_WITH_PARENT = 1  # PR_SET_PDEATHSIG of prctl(2)


@dataclass
class Piece:
    """Calls of one component. answers: what is known, as `[value, kind, message]`, of the first of them."""

    start: int
    calls: int
    payload: bytes
    answers: list[list[Any]] = field(default_factory=list)


class Worker:
    """A forked process that makes calls; `served`: calls that it answered."""

    def __init__(self, setup: Setup, inherited: list[Connection]) -> None:
        self.pipe, theirs = Pipe()
        self.piece: Piece | None = None
        self.ready, self.served = False, 0
        self.deadline = monotonic() + LOADING_SECONDS
        self.pid = os.fork()
        if not self.pid:
            for pipe in (self.pipe, *inherited):  # the trainer must see the warden's end of the pipe close
                pipe.close()
            _work(theirs, setup)
        theirs.close()

    def go_on(self, timeout: float) -> None:
        """Have it make the calls of its piece that are still to do, if it has loaded what it calls."""
        if self.piece is None or not self.ready:  # it would not read, and a long piece would block the pipe
            return
        self.deadline = monotonic() + timeout
        with suppress(ConnectionError):  # it died: its pipe tells
            self.pipe.send_bytes(len(self.piece.answers).to_bytes(4, "big") + self.piece.payload)

    def end(self) -> int:
        """Kill it with all that it started; returns its exit status (its own, if it had ended before)."""
        self.pipe.close()
        for kill in (os.killpg, os.kill):  # until it leads a group of its own, it is alone
            with suppress(ProcessLookupError, PermissionError):
                kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        return os.waitstatus_to_exitcode(status)


class Warden:
    def __init__(self, trainer: Connection, setup: Setup) -> None:
        self.trainer, self.setup, self.limits = trainer, setup, setup.limits
        self.workers: list[Worker] = []

    def serve(self) -> None:
        """Answer requests until the trainer is gone."""
        try:
            while True:
                request = pickle.loads(self.trainer.recv_bytes())
                self._answer_all(deque(Piece(start, calls, payload) for start, calls, payload in request))
        except (EOFError, ConnectionError):
            pass
        finally:
            for worker in self.workers:
                worker.end()

    def _answer_all(self, waiting: deque[Piece]) -> None:
        while True:
            for worker in self.workers:
                if waiting and worker.piece is None:
                    worker.piece = waiting.popleft()
                    worker.go_on(self.limits.timeout)
            while waiting and len(self.workers) < self.limits.workers:
                self._hire(waiting.popleft())
            busy = [worker for worker in self.workers if worker.piece is not None]
            if not busy:
                return
            patience = max(0.0, min(worker.deadline for worker in busy) - monotonic())
            heard = wait([self.trainer, *(worker.pipe for worker in busy)], patience)
            if self.trainer in heard:  # which says nothing while it waits: it is gone
                raise EOFError
            for worker in busy:
                if worker.pipe in heard or worker.pipe.poll():
                    self._hear(worker)
                elif monotonic() >= worker.deadline:
                    self._late(worker)

    def _hire(self, piece: Piece) -> None:
        worker = Worker(self.setup, [self.trainer, *(other.pipe for other in self.workers)])
        self.workers.append(worker)
        worker.piece = piece

    def _hear(self, worker: Worker) -> None:
        """Take one message of a worker."""
        assert worker.piece is not None
        try:
            kind, *content = json.loads(worker.pipe.recv_bytes())
        except (EOFError, ConnectionError, ValueError):
            self._ended(worker, "crash", None)
            return
        worker.deadline = monotonic() + self.limits.timeout
        if kind == "ready":
            worker.ready = True
            worker.go_on(self.limits.timeout)
        elif kind == "refused":
            self._give_up(worker, content[0])
        elif kind == "memory":
            self._ended(worker, "memory", content[0])
        else:
            worker.served += 1
            self._known(worker, worker.piece, content)

    def _known(self, worker: Worker, piece: Piece, answer: list[Any]) -> None:
        piece.answers.append(answer)
        if len(piece.answers) == piece.calls:
            worker.piece = None
            self.trainer.send_bytes(json.dumps([piece.start, piece.answers]).encode())

    def _late(self, worker: Worker) -> None:
        if not worker.ready:
            self._give_up(worker, f"reward: it was not loaded within {LOADING_SECONDS:.0f} s")
        else:
            self._ended(worker, "timeout", f"no answer within {self.limits.timeout:g} s")

    def _ended(self, worker: Worker, kind: FaultKind, message: str | None) -> None:
        """End a worker, and have a fresh one go on with its piece.

        A crash, or too much memory, may come of what earlier calls left behind: in that case the fresh worker tries the
        same call once more.
        """
        piece, served, ready = worker.piece, worker.served, worker.ready
        assert piece is not None
        self.workers.remove(worker)
        how = ending(worker.end())
        if not ready:
            raise_memory = "; raise isolate: memory" if self.limits.memory is not None else ""
            self._refuse(piece, f"reward: the process that loads it ended ({how}){raise_memory}")
            return
        if kind == "timeout" or not served:
            piece.answers.append([None, kind, message or f"its process ended ({how})"])
        if len(piece.answers) < piece.calls:
            self._hire(piece)
        else:
            self.trainer.send_bytes(json.dumps([piece.start, piece.answers]).encode())

    def _give_up(self, worker: Worker, reason: str) -> None:
        piece = worker.piece
        assert piece is not None
        self.workers.remove(worker)
        worker.end()
        self._refuse(piece, reason)

    def _refuse(self, piece: Piece, reason: str) -> None:
        """Tell the trainer that no worker can load the components; it asks no further."""
        self.trainer.send_bytes(json.dumps([piece.start, reason]).encode())


# -- in a worker -------------------------------------------------------------------------------------------------------


def _work(pipe: Connection, setup: Setup) -> NoReturn:
    """Load the components and make calls until the pipe closes. Never returns into the warden's code."""
    status = 1
    try:
        _confine(setup.limits.memory)
        _make_calls(pipe, setup)
        status = 0
    except (EOFError, ConnectionError):
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status)


def _confine(memory: int | None) -> None:
    """Lead a group of processes, die with the warden, and take no more memory than allowed."""
    os.setsid()
    if sys.platform.startswith("linux"):
        import ctypes

        ctypes.CDLL(None).prctl(KILL_WITH_PARENT, signal.SIGKILL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if memory is not None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _make_calls(pipe: Connection, setup: Setup) -> None:
    def say(*message: Any) -> None:
        pipe.send_bytes(json.dumps(message).encode())

    torch.set_num_threads(1)
    try:
        scorers = [
            (pickle.loads(source) if isinstance(source, bytes) else scorer_from(source, arguments), name, keywords)
            for name, source, arguments, keywords in setup.scorers
        ]
    except PosttrainError as error:
        say("refused", str(error))
        return
    except Exception as error:
        say("refused", f"reward: it cannot be loaded by another process: {type(error).__name__}: {error}")
        return
    say("ready")
    while True:
        given = pipe.recv_bytes()
        done = int.from_bytes(given[:4], "big")
        number, answers = pickle.loads(given[4:])
        function, name, keywords = scorers[number]
        for answer in answers[done:]:
            seed_by_call(name, answer.prompt.key, answer.completion)
            found = evaluate(function, answer, keywords)
            if not isinstance(found, Fault):
                say("answer", found, None, "")
            elif found.kind == "memory":
                say("memory", f"more than isolate: memory allows ({found.message})")
                return
            else:
                say("answer", None, found.kind, found.message)


def main() -> None:
    os.set_inheritable(descriptor := int(sys.argv[1]), False)
    trainer = Connection(descriptor)
    torch.set_num_threads(1)
    Warden(trainer, pickle.loads(trainer.recv_bytes())).serve()


if __name__ == "__main__":
    main()
