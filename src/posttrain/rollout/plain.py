"""The plain engine: decoding by the model's own forward pass and cache, one prompt at a time.

For architectures whose attention cannot be replaced (state-space layers, attention sinks). Slower than the embedded
engine, with the same completions: what is drawn depends on the logits and on each row's own random numbers alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from posttrain.models.causal import CausalPolicy, evaluating
from posttrain.rollout.engine import Progress
from posttrain.rollout.rows import Ending, Row, append, start_rows, uniforms
from posttrain.rollout.sampling import draw_next
from posttrain.trajectory import Completion, PosttrainError, Prompt, Sampling

CACHES = ("past_key_values", "cache_params")  # what models call the state they return and take again


class PlainEngine:
    """Samples from any `CausalPolicy` in this process, always with its present weights.

    rows: samples of a prompt decoded together at most.
    """

    def __init__(self, policy: CausalPolicy, *, rows: int = 64) -> None:
        if rows < 1:
            raise PosttrainError(f"rows is {rows}; expected at least 1 completion decoded at a time")
        self.policy = policy
        self.rows = rows

    @property
    def max_length(self) -> int:
        """Tokens of prompt and completion together at most."""
        return self.policy.max_length

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        sampling: Sampling,
        seed: int,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.generate`."""
        rows = start_rows(self.policy, prompts, samples, sampling, seed)
        results: list[list[Completion]] = [[] for _ in prompts]
        done = 0
        with torch.inference_mode(), evaluating(self.policy.model):
            for i, found in groupby(rows, key=lambda row: row.prompt):
                members = list(found)
                for start in range(0, samples, self.rows):
                    part = members[start : start + self.rows]
                    results[i] += self._complete(prompts[i].tokens, part, sampling)
                    done += len(part)
                    if progress is not None:
                        progress(done, len(rows))
        return results

    def _complete(self, prompt: Tensor, rows: list[Row], sampling: Sampling) -> list[Completion]:
        """Draw all rows of one prompt; rows that are over stay in the batch until the last one is."""
        head, ending = self.policy.head(), Ending(self.policy, sampling)
        completions: list[Completion | None] = [None] * len(rows)
        running = list(range(len(rows)))
        out = self._forward(prompt.expand(len(rows), -1))
        states = out.last_hidden_state[:, -1]
        while True:
            live = [rows[i] for i in running]
            append(live, draw_next(head, states, uniforms(live).to(states.device), sampling))
            for i in running:
                if (finish := ending.finish(rows[i])) != "none":
                    completions[i] = ending.completion(rows[i], finish)
            running = [i for i in running if completions[i] is None]
            if not running:
                return [c for c in completions if c is not None]
            if cache := {name: found for name in CACHES if (found := getattr(out, name, None)) is not None}:
                out = self._forward(torch.tensor([[row.tokens[-1]] for row in rows]), **cache)
                states = out.last_hidden_state[running, -1]
            else:  # a model that keeps no state reads all its tokens again
                whole = [torch.cat([prompt, torch.tensor(rows[i].tokens)]) for i in running]
                out = self._forward(torch.stack(whole))
                states = out.last_hidden_state[:, -1]

    def _forward(self, tokens: Tensor, **cache: Any) -> Any:
        return self.policy.body(input_ids=tokens.to(self.policy.device), use_cache=True, **cache)
