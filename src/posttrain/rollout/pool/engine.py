"""The engine on a Ray cluster: prompts go out in pieces to workers that hold copies of the policy."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass
from functools import partial
from typing import Any

from posttrain.models.causal import CausalPolicy
from posttrain.rollout.engine import Progress
from posttrain.rollout.engine_choice import engine_for
from posttrain.rollout.environment import Environment
from posttrain.rollout.pool.actor import MakeEngine, RolloutWorker, pack
from posttrain.rollout.pool.cluster import Cluster, ray_package
from posttrain.rollout.pool.workers import Workers
from posttrain.rollout.vllm.weights import fingerprint
from posttrain.trajectory import Completion, Group, PosttrainError, Prompt, Sampling

COMPLETIONS = 32  # that a piece has about: enough to decode together, few enough to share out


@dataclass(frozen=True)
class Underway:
    """Rollouts that workers are at. pieces: for each future the numbers of the prompts that it answers."""

    prompts: Sequence[Prompt]
    samples: int
    pieces: dict[Future[list[list[Any]]], list[int]]

    def wait(self, progress: Progress | None = None) -> list[list[Any]]:
        """What was drawn for each prompt, in their order."""
        found: list[list[Any]] = [[] for _ in self.prompts]
        done = 0
        for future in as_completed(self.pieces):
            for i, drawn in zip(self.pieces[future], future.result(), strict=True):
                found[i] = drawn
                done += self.samples
            if progress is not None:
                progress(done, self.samples * len(self.prompts))
        return found

    def groups(self, progress: Progress | None = None) -> list[Group]:
        """The same as groups."""
        return [Group(drawn, prompt) for drawn, prompt in zip(self.wait(progress), self.prompts, strict=True)]

    def then(self, call: Callable[[list[Group]], None]) -> None:
        """Call something with the groups once all are there, in whichever thread sees that; never if one fails."""
        left = iter(range(len(self.pieces) - 1, -1, -1))

        def one_more(future: Future[list[list[Any]]]) -> None:
            if next(left) == 0 and all(not f.cancelled() and f.exception() is None for f in self.pieces):
                call(self.groups())

        for future in self.pieces:
            future.add_done_callback(one_more)


class PooledEngine:
    """Draws on the workers of the cluster that this process has joined, with the policy's present weights.

    They go to the workers through the object store, once after they changed. A worker that dies is replaced and its
    piece drawn again: what is drawn depends on seed, prompt and weights alone. `play` has whole episodes played there,
    `begin` does not wait for them.

    rows: completions that a worker decodes together at most. make_engine: what draws in a worker. say: told of each
    worker that died.
    """

    def __init__(
        self,
        policy: CausalPolicy,
        cluster: Cluster,
        *,
        rows: int = 64,
        make_engine: MakeEngine = engine_for,
        say: Callable[[str], None] | None = None,
    ) -> None:
        self.policy, self.cluster = policy, cluster
        self._rows, self._make_engine, self._say = rows, make_engine, say or _say
        self._experts = False
        self._workers: Workers | None = None
        self._marks: tuple[Any, ...] | None = None
        self._version, self._weights = -1, None  # their number, and a reference into the object store

    @property
    def max_length(self) -> int:
        """Tokens of prompt and completion together at most."""
        return self.policy.max_length

    @property
    def experts(self) -> bool:
        """Whether completions say which experts their tokens were sent to."""
        return self._experts

    @experts.setter
    def experts(self, wanted: bool) -> None:
        if self._workers is not None and wanted != self._experts:
            raise PosttrainError("experts are recorded from the first rollout on; set it before")
        self._experts = wanted

    @property
    def replaced(self) -> int:
        """How many workers died and were replaced."""
        return 0 if self._workers is None else self._workers.replaced

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        sampling: Sampling,
        seed: int,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.generate`."""
        return self._sent("generate", prompts, samples, (sampling, seed)).wait(progress)

    def play(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        sampling: Sampling,
        seed: int,
        environment: Environment | None = None,
        progress: Progress | None = None,
    ) -> list[Group]:
        """What `rollout` returns, with the environment at work where the policy is."""
        return self.begin(prompts, samples, sampling, seed, environment).groups(progress)

    def begin(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        sampling: Sampling,
        seed: int,
        environment: Environment | None = None,
    ) -> Underway:
        """Have episodes played with the weights as they are now, whatever becomes of them meanwhile."""
        return self._sent("play", prompts, samples, (sampling, seed, environment))

    def close(self) -> None:
        """End the workers."""
        if self._workers is not None:
            self._workers.close()

    # -- work for the workers ------------------------------------------------------------------------------------------

    def _sent(self, what: str, prompts: Sequence[Prompt], samples: int, more: tuple[Any, ...]) -> Underway:
        if samples < 1:
            raise PosttrainError(f"samples is {samples}; expected at least 1 completion a prompt")
        workers = self._ready()
        version, weights = self._present()
        pieces = {}
        for numbers in pieces_of(prompts, self.cluster.piece or max(1, COMPLETIONS // samples)):
            arguments = (version, weights, [prompts[i] for i in numbers], samples, *more)
            pieces[workers.submit(partial(_call, what, arguments))] = numbers
        return Underway(prompts, samples, pieces)

    def _present(self) -> tuple[int, Any]:
        """The present weights' number, and where they lie."""
        if (marks := fingerprint(self.policy)) != self._marks:
            self._weights, self._marks = ray_package().put(pack(self.policy)), marks
            self._version += 1
        return self._version, self._weights

    def _ready(self) -> Workers:
        """The workers, made with the policy as it is when they are first needed."""
        if self._workers is None:
            ray = ray_package()
            start = ray.put(on_cpu(self.policy))
            actor = ray.remote(RolloutWorker).options(
                num_cpus=self.cluster.cpus, num_gpus=self.cluster.gpus, max_restarts=0
            )
            arguments = (start, self._make_engine, self._rows, self._experts, self.cluster.cpus)
            self._workers = Workers(lambda: actor.remote(*arguments), self.cluster.workers, "rollout worker", self._say)
        return self._workers


def pieces_of(prompts: Sequence[Prompt], size: int) -> list[list[int]]:
    """Numbers of the prompts of each piece. Prompts of one key stay together, since an engine counts their samples."""
    by_key: dict[int, list[int]] = {}
    for i, prompt in enumerate(prompts):
        by_key.setdefault(prompt.key, []).append(i)
    pieces: list[list[int]] = []
    for numbers in by_key.values():
        if not pieces or len(pieces[-1]) >= size:
            pieces.append([])
        pieces[-1] += numbers
    return pieces


def _call(what: str, arguments: tuple[Any, ...], worker: Any) -> Any:
    return getattr(worker, what).remote(*arguments)


def on_cpu(policy: CausalPolicy) -> CausalPolicy:
    """The policy, or a copy of it on the CPU, as it can be sent anywhere."""
    if policy.device.type == "cpu":
        return policy
    other = CausalPolicy(copy.deepcopy(policy.model).cpu(), policy.tokenizer, policy.name)
    other._packs = policy._packs
    return other


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
