"""Prompts with a measure of how informative each is, from which some are drawn to be evolved.

How far the policy is from the best it could do on a prompt is unknown; what its own completions are worth, the best
against the worst, stands for it. Reference: Scalable Reinforcement Post-Training Beyond Static Human Prompts: Evolving
Alignment via Asymmetric Self-Play, 2024, arXiv 2411.00062 (card 021).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from posttrain.trajectory import PosttrainError, Prompt

Rewards = Sequence[float]  # of one prompt's completions
SMALL = 1e-2


def gap(rewards: Rewards) -> float:
    """Best minus worst."""
    return max(rewards) - min(rewards)


def mean_gap(rewards: Rewards) -> float:
    """Best minus mean."""
    return max(rewards) - sum(rewards) / len(rewards)


def duel(rewards: Rewards) -> float:
    """Best minus second best."""
    return max(rewards) - sorted(rewards)[-2] if len(rewards) > 1 else 0.0


def variance(rewards: Rewards) -> float:
    return float(np.var(rewards))


def alike(rewards: Rewards) -> float:
    """Every prompt as informative as any other."""
    return 1.0


def inverse_gap(rewards: Rewards) -> float:
    """The least informative first, as a control."""
    return 1 / (gap(rewards) + SMALL)


INFORMATIVENESS: dict[str, Callable[[Rewards], float]] = {
    "gap": gap,
    "mean-gap": mean_gap,
    "duel": duel,
    "variance": variance,
    "uniform": alike,
    "inverse": inverse_gap,
}


@dataclass(slots=True)
class Held:
    """A prompt in the buffer. info: as of its last visit. generation: 0 for an original, one more than its parent's."""

    prompt: Prompt
    info: float
    generation: int = 0


@dataclass
class PromptBuffer:
    """Prompts by their question, the longest unvisited first; beyond `capacity` these are forgotten."""

    capacity: int = 10_000
    held: dict[str, Held] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.held)

    def __contains__(self, question: str) -> bool:
        return question in self.held

    def visit(self, prompt: Prompt, info: float, generation: int = 0) -> None:
        """What was found on a prompt just now; takes the place of what was known of it."""
        before = self.held.pop(prompt.question, None)
        self.held[prompt.question] = Held(prompt, info, generation if before is None else before.generation)
        while len(self.held) > self.capacity:
            del self.held[next(iter(self.held))]

    def draw(self, count: int, chance: np.random.Generator) -> list[Held]:
        """Different prompts with weights by their information; one without any is never drawn, so they may be fewer."""
        some = [held for held in self.held.values() if held.info > 0]
        weights = np.array([held.info for held in some], dtype=np.float64)
        if not some or count < 1:
            return []
        places = chance.choice(len(some), size=min(count, len(some)), replace=False, p=weights / weights.sum())
        return [some[int(i)] for i in places]

    def state_dict(self) -> dict[str, Any]:
        """Raises PosttrainError where a prompt's answer or meta is nothing that JSON can hold."""
        return {"held": [_row(held) for held in self.held.values()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held = {}
        for row in state["held"]:
            told = row["prompt"]
            prompt = Prompt(
                torch.tensor(told["tokens"], dtype=torch.int64),
                told["messages"],
                told["text"],
                told["answer"],
                told["key"],
                told["meta"],
            )
            self.held[prompt.question] = Held(prompt, row["info"], row["generation"])


def _row(held: Held) -> dict[str, Any]:
    prompt = held.prompt
    told = {
        "tokens": prompt.tokens.tolist(), "messages": [dict(m) for m in prompt.messages], "text": prompt.text,
        "answer": prompt.answer, "key": prompt.key, "meta": prompt.meta,
    }  # fmt: skip
    try:
        json.dumps(told)
    except (TypeError, ValueError) as error:
        raise PosttrainError(
            f"prompt buffer: the prompt {prompt.question[:60]!r} cannot be kept in a checkpoint: {error}; expected an "
            f"answer and meta of text, numbers, lists and mappings"
        ) from None
    return {"prompt": told, "info": held.info, "generation": held.generation}
