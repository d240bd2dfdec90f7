"""A reward whose components are called by workers of a Ray cluster."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any

import torch

from posttrain.reward.fault import Fault
from posttrain.reward.reward import Reward, answers_of
from posttrain.reward.scorers import Answer
from posttrain.rollout.pool.cluster import ray_package
from posttrain.rollout.pool.workers import Workers
from posttrain.trajectory import Group

PIECE = 16  # answers that a worker is given at a time

Outcomes = list[Sequence[float | Fault]]


class RewardWorker:
    """What runs in a worker: the reward, with random numbers that follow from the call."""

    def __init__(self, reward: Reward) -> None:
        torch.set_num_threads(1)
        self.reward = reward

    def ready(self) -> int:
        """The number of the process."""
        return os.getpid()

    def outcomes(self, answers: Sequence[Answer]) -> Outcomes:
        """See `Reward.outcomes`."""
        return self.reward.outcomes(answers, seeded=True)


class PooledReward(Reward):
    """Another reward, called by the workers of the cluster that this process has joined; failures are counted here.

    A worker that dies is replaced and its answers judged again. A component that always ends its process ends the run,
    unless it is isolated as well (`isolate` in the reward). say: told of each worker that died.
    """

    def __init__(self, reward: Reward, workers: int, say: Callable[[str], None] = lambda text: None) -> None:
        super().__init__(reward.components, reward.on_error)
        self.reward, self.count, self.say = reward.afresh(), workers, say
        self._workers: Workers | None = None
        self._begun: dict[Any, list[Future[Outcomes]]] = {}
        self._lock = threading.Lock()

    def outcomes(self, answers: Sequence[Answer], *, seeded: bool = True) -> Outcomes:
        """What each component makes of each answer, in their order."""
        with self._lock:
            begun = self._begun.pop(_identity(answers), None)
        found = [piece.result() for piece in (self._sent(answers) if begun is None else begun)]
        return [[value for piece in found for value in piece[i]] for i in range(len(self.components))]

    def begin(self, groups: Sequence[Group]) -> None:
        """Have groups judged that will be scored later, as they are. Any thread may ask for it."""
        answers = answers_of(groups)
        pieces = self._sent(answers)
        with self._lock:
            self._begun[_identity(answers)] = pieces

    def _sent(self, answers: Sequence[Answer]) -> list[Future[Outcomes]]:
        workers = self._ready()
        starts = range(0, len(answers), PIECE)
        return [workers.submit(partial(_judged, answers[start : start + PIECE])) for start in starts]

    def close(self) -> None:
        """End the workers."""
        if self._workers is not None:
            self._workers.close()

    def _ready(self) -> Workers:
        with self._lock:
            if self._workers is None:
                ray = ray_package()
                actor, reward = ray.remote(RewardWorker).options(num_cpus=1, max_restarts=0), ray.put(self.reward)
                self._workers = Workers(lambda: actor.remote(reward), self.count, "reward worker", self.say)
            return self._workers


def _identity(answers: Sequence[Answer]) -> tuple[Any, ...]:
    return tuple((id(a.prompt), a.completion, a.tokens, a.finish) for a in answers)


def _judged(answers: Sequence[Answer], worker: Any) -> Any:
    return worker.outcomes.remote(answers)
