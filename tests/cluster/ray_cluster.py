"""A Ray cluster on this machine for all tests, and what runs on it: small actors, an environment that gets killed."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from posttrain.rollout.environment import Reply
from posttrain.rollout.pool.cluster import Cluster, joined
from posttrain.trajectory import Completion, Prompt
from tiny_training import letters

ROOM = Cluster(workers=6)
PATIENCE = 300  # seconds, on a machine that has other things to do


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    torch.set_num_threads(1)  # as the workers compute: sums in the same order
    with joined(ROOM):
        yield


class Light:
    """An actor that starts at once."""

    def __init__(self, bad: bool = False) -> None:
        if bad:
            raise OSError("no such device")
        self.calls = 0

    def ready(self) -> int:
        return os.getpid()

    def add(self, number: int) -> tuple[int, int]:
        self.calls += 1
        return number + 1, os.getpid()

    def fail(self) -> None:
        raise ValueError("by itself")

    def wait_at(self, file: str) -> str:
        """The first time it says which process it is, and waits to be killed."""
        hang_once(Path(file))
        return "done"

    def exit(self) -> None:
        os._exit(3)

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


def hang_once(file: Path) -> None:
    if not file.exists():
        scratch = file.with_suffix(".writing")
        scratch.write_text(str(os.getpid()))
        scratch.rename(file)
        time.sleep(1_000)


@contextmanager
def killing(file: Path) -> Iterator[None]:
    """Kill the process that writes its number into the file, as soon as it is there."""

    def watch() -> None:
        for _ in range(30_000):
            if file.exists():
                os.kill(int(file.read_text()), signal.SIGKILL)
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    yield
    thread.join(PATIENCE)
    assert file.exists(), "nothing was killed"


@dataclass(frozen=True)
class Mortal:
    """Two turns. The first time that the prompt `key` is answered in that turn its worker hangs until it is killed."""

    file: str
    key: int
    turn: int = 1
    max_turns: int = 2

    def respond(self, prompt: Prompt, completions: list[Completion], turn: int) -> Reply:
        if self.file and prompt.key == self.key and turn == self.turn:
            hang_once(Path(self.file))
        return Reply(torch.tensor([5, 6, 7 + turn]), reward=0.5 * turn, done=turn == 1)


@dataclass(frozen=True)
class MortalLetters:
    """Share of letters. The first time that a completion of prompt 2 is scored its worker hangs until it is killed."""

    file: str

    def __call__(self, completion: str, prompt: Prompt) -> float:
        if prompt.key == 2:
            hang_once(Path(self.file))
        return letters(completion, prompt)


def vowels(completion: str, prompt: Prompt) -> float:
    return sum(c in "aeiou" for c in completion) / (1 + len(completion))
