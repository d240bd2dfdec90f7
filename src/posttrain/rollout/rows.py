"""Completions in the making: what the engines of this process share, whichever way they compute the next logits.

A *row* is one completion that is being drawn. Its random numbers come from its own generator, seeded by the call's
seed, its prompt's key and its number among the samples of that key; so it does not matter what else is in the call.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from posttrain.models.causal import CausalPolicy
from posttrain.rollout.sampling import Draw
from posttrain.trajectory import Completion, Finish, PosttrainError, Prompt, Sampling


@dataclass(slots=True)
class Row:
    """prompt: index of the prompt in the call; sample: number among its samples; limit: tokens at most. experts: where
    they are recorded, of the prompt and then of each token read, `[tokens, layers, k]`.
    """

    prompt: int
    sample: int
    limit: int
    noise: np.random.Generator
    tokens: list[int] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    logp_full: list[float] = field(default_factory=list)
    experts: list[Tensor] = field(default_factory=list)


def start_rows(
    policy: CausalPolicy, prompts: Sequence[Prompt], samples: int, sampling: Sampling, seed: int
) -> list[Row]:
    """Check a request and make its rows, in the order of the prompts, the samples of a prompt together."""
    if samples < 1:
        raise PosttrainError(f"samples is {samples}; expected at least 1 completion a prompt")
    context = policy.max_length
    rows = []
    seen: Counter[int] = Counter()
    for i, prompt in enumerate(prompts):
        length = len(prompt.tokens)
        if not length:
            raise PosttrainError(f"prompt {prompt.key} is empty: a completion needs at least one token before it")
        if length >= context:
            raise PosttrainError(
                f"prompt {prompt.key} has {length} tokens and the model's context is {context}, so no completion fits: "
                f"shorten the prompt or take a model with a longer context"
            )
        limit = min(sampling.max_tokens, context - length)
        for s in range(samples):
            entropy = [seed % 2**64, prompt.key % 2**64, seen[prompt.key] * samples + s]
            rows.append(Row(i, s, limit, np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))))
        seen[prompt.key] += 1
    return rows


def uniforms(rows: Sequence[Row]) -> Tensor:
    """The next random number of each row, `[rows]` fp64 in [0, 1)."""
    return torch.tensor([row.noise.random() for row in rows], dtype=torch.float64)


def append(rows: Sequence[Row], drawn: Draw) -> None:
    """Give each row the token drawn for it."""
    for row, token, logp, full in zip(
        rows, drawn.token.tolist(), drawn.logp.tolist(), drawn.logp_full.tolist(), strict=True
    ):
        row.tokens.append(token)
        row.logp.append(logp)
        row.logp_full.append(full)


class Ending:
    """When a row is over, and the completion it then is."""

    def __init__(self, policy: CausalPolicy, sampling: Sampling) -> None:
        self.tokenizer, self.stop, self.ends = policy.tokenizer, sampling.stop, policy.end_tokens

    def finish(self, row: Row) -> Finish:
        """`stop` at an end token or a stop string (both stay in the completion), `length` at the limit, else `none`."""
        if row.tokens[-1] in self.ends or (self.stop and any(s in self.text(row) for s in self.stop)):
            return "stop"
        return "length" if len(row.tokens) >= row.limit else "none"

    def text(self, row: Row) -> str:
        return str(self.tokenizer.decode(row.tokens, skip_special_tokens=True))

    def completion(self, row: Row, finish: Finish) -> Completion:
        with torch.inference_mode(False):  # tensors that autograd may use later
            return Completion(
                torch.tensor(row.tokens),
                torch.tensor(row.logp),
                torch.tensor(row.logp_full),
                finish,
                self.text(row),
                torch.cat(row.experts) if row.experts else None,
            )
