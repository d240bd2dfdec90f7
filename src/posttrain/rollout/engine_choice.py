"""Which engine draws a run's completions: one of this process, or vLLM."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch

from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.engine import Engine
from posttrain.rollout.plain import PlainEngine
from posttrain.rollout.rollout import play
from posttrain.trajectory import PosttrainError, Prompt, Sampling

if TYPE_CHECKING:
    from posttrain.rollout.vllm.backend import Backend
    from posttrain.rollout.vllm.engine import VllmEngine

NAMES = ("embedded", "vllm", "vllm-server")
_TRIED: WeakKeyDictionary[CausalPolicy, bool] = WeakKeyDictionary()  # whether the embedded engine decodes a policy


def engine_for(policy: CausalPolicy, rows: int = 64) -> EmbeddedEngine | PlainEngine:
    """The embedded engine where it gives the model's own log-probabilities (tried on a few tokens), else the plain one.

    rows: completions decoded together at most.
    """
    if policy not in _TRIED:
        _TRIED[policy] = policy.packs and _decodes(EmbeddedEngine(policy))
    return EmbeddedEngine(policy, rows=rows) if _TRIED[policy] else PlainEngine(policy, rows=rows)


@torch.no_grad()
def _decodes(engine: EmbeddedEngine) -> bool:
    """Whether the log-probabilities of decoded tokens are those that training would compute."""
    policy = engine.policy
    prompt = Prompt(torch.arange(3) % policy.head().weight.shape[0])
    try:
        groups = play(engine, [prompt], 2, Sampling(max_tokens=4), seed=0)
    except (NotImplementedError, RuntimeError, TypeError, ValueError, KeyError):
        return False
    batch = Batch.of(groups)
    expected = policy.log_likelihood(batch).logp.cpu()
    tolerance = 1e-3 if policy.dtype == torch.float32 else 0.25  # nats a token; another computation is whole nats off
    return bool((expected - batch.behaviour_logp_full).abs().mean() <= tolerance)


@dataclass(frozen=True)
class EngineChoice:
    """What a recipe says of the engine.

    name: `embedded` (see `engine_for`), `vllm` (in this process), `vllm-server` (a server of the run's own), or the URL
    of a running server, whose token is in the environment variable POSTTRAIN_ENGINE_TOKEN.
    python: the interpreter that has vLLM, where a server is started; this one by default.
    exchange: a folder for weights that vLLM sees too; by default one in this machine's memory, and for a URL none: they
    go over the wire. options: arguments of vLLM's engine (`max_model_len`, `tensor_parallel_size`, ...).
    """

    name: str = "embedded"
    python: str | None = None
    exchange: str | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        url = self.name.startswith(("http://", "https://"))
        if self.name not in NAMES and not url:
            raise PosttrainError(
                f"engine {self.name!r} is unknown; expected {', '.join(NAMES)} or a URL such as http://127.0.0.1:8000"
            )
        for option, given, of in (
            ("python", self.python, self.name == "vllm-server"),
            ("options", self.options, self.name in ("vllm", "vllm-server")),
            ("exchange", self.exchange, self.name != "embedded"),
        ):
            if given and not of:
                raise PosttrainError(f"engine {self.name} has no {option}; leave it out")
        if url:
            self.backend()  # a URL that is none

    @property
    def embedded(self) -> bool:
        return self.name == "embedded"

    def backend(self) -> Backend:
        """vLLM as it was chosen, not yet started."""
        from posttrain.rollout.vllm.guard import TOKEN
        from posttrain.rollout.vllm.in_process import InProcess
        from posttrain.rollout.vllm.served import Served
        from posttrain.rollout.vllm.started import Started

        if self.name == "vllm":
            return InProcess(options=self.options)
        if self.name == "vllm-server":
            return Started(python=self.python, options=self.options)
        return Served(self.name, os.environ.get(TOKEN) or None, shared=self.exchange is not None)


class Engines:
    """The engine of a run, for one policy after the other. vLLM starts with the first completion that is drawn."""

    def __init__(self, choice: EngineChoice | None = None, say: Callable[[str], None] | None = None) -> None:
        self.choice, self.say = choice or EngineChoice(), say
        self._vllm: VllmEngine | None = None
        self._backend: Backend | None = None

    def check(self) -> None:
        """Raise what can be known to be wrong before anything is loaded."""
        if not self.choice.embedded:
            self._backend = self.choice.backend()
            self._backend.check()

    def of(self, policy: CausalPolicy, rows: int = 64) -> Engine:
        """The engine for a policy. rows: completions decoded together at most; vLLM keeps those it was started with."""
        if self.choice.embedded:
            return engine_for(policy, rows)
        if self._vllm is None:
            from posttrain.rollout.vllm.engine import VllmEngine

            exchange = Path(self.choice.exchange) if self.choice.exchange else None
            backend = self._backend or self.choice.backend()
            self._vllm = VllmEngine(policy, backend, rows=rows, exchange=exchange, say=self.say)
        return self._vllm.serve(policy)

    def close(self) -> None:
        """End what was started."""
        if self._vllm is not None:
            self._vllm.close()
            self._vllm = None
