"""The few small types that every room speaks: Message, Prompt, Trajectory, Group, Sampling, Completion.

A *trajectory* is one sampled or demonstrated token sequence; a *group* is what belongs together for credit assignment:
the completions of one prompt (online), a demonstration (SFT), a chosen and a rejected answer (preferences).
Tensors here are unpadded and live on the CPU; `Batch` (objective/batch.py) makes flat per-token arrays of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

Message = Mapping[str, Any]  # {"role": "user" | "assistant" | "system" | "tool", "content": str, ...}
Source = Literal["policy", "expert", "teacher", "replay"]
Label = Literal["chosen", "rejected", "none"]
Finish = Literal["stop", "length", "none"]
SOURCES: tuple[Source, ...] = ("policy", "expert", "teacher", "replay")


class PosttrainError(Exception):
    """An error whose message is one line for the user: what was given, what was expected, what to do.

    The command line prints it without a traceback and exits with code 1.
    """


@dataclass(slots=True)
class Prompt:
    """What a rollout starts from.

    tokens: `[length]` int64, the prompt as the model sees it (chat template and generation prompt included).
    messages: the conversation behind it; empty where the prompt was plain text.
    answer: the reference answer a verifier compares with (any type, None where there is none).
    key: stable identity of the prompt within its data set (used to seed sampling and to pair evaluations).
    meta: whatever else the row held (scorers read it).
    demonstration: a worked solution to imitate, where the row has one and the method asks for it.
    """

    tokens: Tensor
    messages: list[Message] = field(default_factory=list)
    text: str = ""
    answer: Any = None
    key: int = 0
    meta: dict[str, Any] = field(default_factory=dict)
    demonstration: Trajectory | None = None

    @property
    def question(self) -> str:
        """The last user message, or the plain text: what a person would call the prompt."""
        for message in reversed(self.messages):
            if message.get("role") == "user":
                return str(message.get("content", ""))
        return self.text


@dataclass(slots=True)
class Trajectory:
    """One sampled or demonstrated sequence.

    tokens: `[length]` int64, prompt and completion.
    action_mask: `[length]` bool, the tokens the policy chose (or is to imitate). Position 0 is never an action.
    behaviour_logp: `[length]` fp32, log-probability *as sampled* (temperature and truncation included); 0 elsewhere.
    behaviour_logp_full: `[length]` fp32, the same under the full vocabulary at the sampling temperature.
    turn: `[length]` int64, the turn of each token (0 for single-turn).
    token_reward: `[length]` fp32, rewards given to single tokens or turn ends; None where only the outcome counts.
    reward: the outcome reward (weighted sum of `rewards`); NaN until something scored it.
    token_source: `[length]` int64, index into SOURCES of who wrote each token, where one sequence has several authors
        (a demonstration's prefix with the policy's own continuation); None: `source` wrote all of it.
    facts: numbers that a rollout strategy or a reward shaping leaves for the advantage, by name (the success rate of
        everything drawn for the prompt, ...).
    experts: `[length - 1, layers, k]` int16, the experts that the engine sent each token to (the last one is only
        predicted), where it is a mixture of experts and was asked to record them.
    """

    tokens: Tensor
    action_mask: Tensor
    behaviour_logp: Tensor | None = None
    behaviour_logp_full: Tensor | None = None
    turn: Tensor | None = None
    token_reward: Tensor | None = None
    reward: float = float("nan")
    rewards: dict[str, float] = field(default_factory=dict)
    source: Source = "policy"
    label: Label = "none"
    finish: Finish = "none"
    text: str = ""
    weight: float = 1.0
    token_source: Tensor | None = None
    facts: dict[str, float] = field(default_factory=dict)
    experts: Tensor | None = None

    def __post_init__(self) -> None:
        if self.tokens.ndim != 1 or self.tokens.shape != self.action_mask.shape:
            raise ValueError(
                f"a trajectory needs tokens and action_mask of one shape [length]; "
                f"got {tuple(self.tokens.shape)} and {tuple(self.action_mask.shape)}"
            )
        if self.tokens.numel() and bool(self.action_mask[0]):
            self.action_mask = self.action_mask.clone()
            self.action_mask[0] = False  # nothing predicts the first token

    @property
    def length(self) -> int:
        return int(self.tokens.numel())

    @property
    def prompt_length(self) -> int:
        """Number of tokens before the first action (the whole length where there is no action)."""
        actions = self.action_mask.nonzero()
        return int(actions[0]) if len(actions) else self.length

    @property
    def actions(self) -> int:
        return int(self.action_mask.sum())


@dataclass(slots=True)
class Group:
    """Trajectories that share a prompt (and so a baseline, or a preference)."""

    trajectories: list[Trajectory]
    prompt: Prompt | None = None

    def __len__(self) -> int:
        return len(self.trajectories)

    @property
    def rewards(self) -> Tensor:
        """`[trajectories]` fp32 outcome rewards."""
        return torch.tensor([t.reward for t in self.trajectories], dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class Sampling:
    """How completions are drawn. Applied in the order of `transformers`: temperature, top-k, top-p, min-p.

    temperature 0 is greedy. top_k 0, top_p 1 and min_p 0 switch their truncation off.
    """

    max_tokens: int = 128
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, low, high in (
            ("max_tokens", 1, None),
            ("temperature", 0, None),
            ("top_k", 0, None),
            ("top_p", 0, 1),
            ("min_p", 0, 1),
        ):
            value = getattr(self, name)
            if not value >= low or (high is not None and value > high) or (name == "top_p" and value == 0):
                raise PosttrainError(f"sampling: {name} is {value!r}; expected a number from {low} to {high or 'any'}")

    @property
    def truncated(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


@dataclass(slots=True)
class Completion:
    """What an engine returns for one sample: its tokens (the end token included when it stopped), log-probabilities
    as sampled and over the full vocabulary (`[length]` fp32 each), why it ended, and its text (special tokens removed).
    experts: as in `Trajectory`, of the prompt and the completion, where the engine records them.
    """

    tokens: Tensor
    logp: Tensor
    logp_full: Tensor
    finish: Finish
    text: str = ""
    experts: Tensor | None = None
