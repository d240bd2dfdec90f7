"""Environments: who answers the policy, and when a conversation is over.

An environment sees each completion and returns the tokens that the world puts behind it (a tool's result, the next
user turn), or nothing when the episode ends. Tokens are appended as they are, never re-tokenised, so log-probabilities
stay those of what was sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from posttrain.trajectory import Completion, Prompt


@dataclass(slots=True)
class Reply:
    """What the world answers: tokens to append (`[length]` int64; not actions, not kept at the end of an episode), a
    reward for the turn, and whether the episode is over.
    """

    tokens: Tensor
    reward: float = 0.0
    done: bool = False


class Environment(Protocol):
    """max_turns: policy turns at most. `respond` is told the prompt, all completions so far and the turn (from 0)."""

    @property
    def max_turns(self) -> int: ...
    def respond(self, prompt: Prompt, completions: list[Completion], turn: int) -> Reply: ...


@dataclass(frozen=True, slots=True)
class SingleTurn:
    """One prompt, one completion."""

    max_turns: int = 1

    def respond(self, prompt: Prompt, completions: list[Completion], turn: int) -> Reply:
        return Reply(torch.empty(0, dtype=torch.int64), done=True)
