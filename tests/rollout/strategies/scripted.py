"""An engine that says what it is told, prompts that carry demonstrations, and the context of one step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from conftest import make_model, make_tokenizer
from posttrain.data.templates import render_completion, render_prompt
from posttrain.models.causal import CausalPolicy
from posttrain.reward.reward import Reward
from posttrain.rollout.context import StepContext
from posttrain.trajectory import Completion, Prompt, Sampling, Trajectory

TOKENIZER = make_tokenizer()


class Scripted:
    """Answers each prompt with the texts given for it, in turn."""

    max_length = 256

    def __init__(self, answers: dict[str, Sequence[str]]) -> None:
        self.answers = answers

    def generate(
        self, prompts: Sequence[Prompt], samples: int, sampling: Sampling, seed: int, progress: Any = None
    ) -> list[list[Completion]]:
        return [[completion(self.answers[p.question][i]) for i in range(samples)] for p in prompts]


def completion(text: str) -> Completion:
    tokens = torch.tensor([*TOKENIZER.encode(text), TOKENIZER.eos_token_id])
    return Completion(tokens, torch.zeros(len(tokens)), torch.zeros(len(tokens)), "stop", text)


def prompt(question: str, solution: str | None, answer: str = "yes", chat: bool = True) -> Prompt:
    made = render_prompt(TOKENIZER, question, chat=chat)
    made.answer, made.key = answer, sum(question.encode())
    if solution is not None:
        tokens, mask = render_completion(TOKENIZER, question, solution, chat=chat)
        made.demonstration = Trajectory(tokens, mask, source="expert", finish="stop", text=solution)
    return made


def exact(text: str, prompt: Prompt) -> float:
    """1 for the answer, 1/2 for a text that holds it."""
    return 1.0 if text == prompt.answer else 0.5 if str(prompt.answer) in text else 0.0


def context(answers: dict[str, Sequence[str]], group: int, reward: Reward | None = None) -> StepContext:
    made = Reward({"exact": (exact, 1.0)}) if reward is None else reward
    return StepContext(
        step=0,
        total=1,
        engine=Scripted(answers),  # type: ignore[arg-type]
        sampling=Sampling(max_tokens=32),
        group=group,
        score=made.score_groups,
        seed=0,
        policy=CausalPolicy(make_model(), TOKENIZER, "tiny"),
        weights=made.weights,
    )
