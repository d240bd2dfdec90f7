"""A few processes that work through a list, none of which outlives the process that started it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
PATIENCE = 5.0  # seconds that a process is given to end before it is killed


def work_through(
    items: Sequence[Item],
    work: Callable[[Item], str | None],
    count: int,
    started: Callable[[Item], None] = lambda item: None,
) -> Generator[tuple[Item, str | None]]:
    """Let `count` fresh processes of one thread each work, and give each item as it is done, with what went wrong.

    work: a function of a module; returns None, or what went wrong in one line. A process that dies takes only its item
    along: another takes its place. Leaving the iteration ends all of them.
    """
    waiting = list(reversed(items))
    workers: list[_Worker[Item]] = []
    try:
        while waiting or workers:
            while waiting and len(workers) < count:
                workers.append(_Worker(work))
            for worker in workers:
                if worker.item is None and waiting:
                    item = waiting.pop()
                    started(item)
                    worker.give(item)
            by_pipe = {worker.pipe: worker for worker in workers if worker.item is not None}
            for pipe in wait(list(by_pipe)):
                worker = by_pipe[pipe]  # type: ignore[index]
                item, error = worker.take()
                if not worker.alive or not waiting:
                    worker.end()
                    workers.remove(worker)
                yield item, error
    finally:
        for worker in workers:
            worker.end()


class _Worker(Generic[Item]):
    """A process with a pipe; `item` is what it works on."""

    def __init__(self, work: Callable[[Item], str | None]) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.item: Item | None = None
        self.alive = True
        self.process = context.Process(target=_serve, args=(theirs, work), daemon=True)
        with _one_thread():
            self.process.start()
        theirs.close()

    def give(self, item: Item) -> None:
        self.item = item
        with suppress(BrokenPipeError):  # it died: `take` tells
            self.pipe.send(item)

    def take(self) -> tuple[Item, str | None]:
        """The item that it is done with, and what went wrong."""
        assert self.item is not None
        item, self.item = self.item, None
        try:
            return item, self.pipe.recv()
        except (EOFError, ConnectionResetError):
            self.alive = False
            self.process.join(PATIENCE)
            return item, f"its process ended without a word ({_ending(self.process.exitcode)})"

    def end(self) -> None:
        self.pipe.close()
        if self.item is not None:
            self.process.terminate()
        self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _serve(pipe: Connection, work: Callable[[Any], str | None]) -> None:
    """What a worker does: items one after the other, until the pipe closes or its parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        pipe.send(work(item))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Processes started inside compute with one thread: libraries read it when they are loaded."""
    before = {name: os.environ.get(name) for name in ONE_THREAD}
    os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _ending(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"{name}: out of memory, perhaps" if name == "SIGKILL" else name
