"""What a rollout engine is: prompts in, sampled completions with exact log-probabilities out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from posttrain.trajectory import Completion, PosttrainError, Prompt, Sampling

Progress = Callable[[int, int], None]  # (finished completions, all completions)


class Engine(Protocol):
    """Generates completions. Deterministic given `seed`: sample `j` of the prompt with key `k` does not depend on
    which other prompts are in the call.

    An engine whose model has a limited context says it as an attribute `max_length` (tokens of prompt and completion
    together); a rollout of several turns then ends an episode that has no room left. One that can say which experts it
    sends tokens to has an attribute `experts` (bool) that switches it on. One that plays whole episodes elsewhere has
    `play`, with the arguments of `rollout`, and `begin`, which does not wait for them (`pool.engine.PooledEngine`).
    """

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        sampling: Sampling,
        seed: int,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """Return `samples` completions for each prompt, in the order of `prompts`."""
        ...


def keep_experts(engine: Engine, who: str) -> None:
    """Have an engine say which experts it sends tokens to, for `who` replays them."""
    if not hasattr(engine, "experts"):
        raise PosttrainError(
            f"{who} replays the sampler's experts, which {type(engine).__name__} does not record; replay those of the "
            f"trainer, or take a model that the embedded engine decodes"
        )
    engine.experts = True
