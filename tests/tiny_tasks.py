"""A tiny policy, a task for it, and a step's context that can draw: for tests of strategies and whole methods."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from conftest import make_model, make_tokenizer
from posttrain.evaluation.task import Task, TaskItem
from posttrain.models.causal import CausalPolicy
from posttrain.reward.reward import reward_from
from posttrain.rollout.context import StepContext
from posttrain.rollout.engine_choice import engine_for
from posttrain.trajectory import Completion, Prompt, Sampling

TOKENIZER = make_tokenizer()
TOKENIZER.chat_template = None  # prompts of a few tokens
END = 2
Scorer = Callable[[str, Prompt], float]


@contextmanager
def single_precision() -> Iterator[None]:
    """fp32 by default, whatever the tests of losses in the same module compute in."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


def tiny_policy(seed: int = 0, **config: Any) -> CausalPolicy:
    with single_precision():
        return CausalPolicy(make_model(seed, **config), TOKENIZER, f"tiny-{seed}")


def letters(completion: str, prompt: Prompt) -> float:
    """Share of letters, a reward that completions differ in."""
    return sum(c.isalpha() for c in completion) / (1 + len(completion))


def tiny_task(rows: int = 8, reward: Scorer = letters) -> Task:
    """Problems `p0:`, `p1:`, ... whose solutions have 10 characters; right is what earns half a point."""
    items = [TaskItem(f"p{i}:", answer=str(i), solution="abcdefghi" + str(i % 10)) for i in range(rows)]
    return Task("tiny", items, [TaskItem("q:", answer="0")], reward_from(reward), threshold=0.5)


def tiny_prompts(rows: int = 3) -> list[Prompt]:
    """The task's problems with their demonstrations."""
    return tiny_task(rows).prompts(TOKENIZER, "train", demonstrations=True)


def step_context(policy: CausalPolicy, reward: Scorer = letters, **fields: Any) -> StepContext:
    given: dict[str, Any] = {"step": 0, "total": 10, "engine": engine_for(policy), "sampling": Sampling(max_tokens=12)}
    given |= {"group": 4, "seed": 5, "policy": policy, "score": reward_from(reward).score_groups}
    return StepContext(**{**given, **fields})


class Scripted:
    """An engine that says what it is told: by the prompt's key the texts that it says, one after another."""

    def __init__(self, texts: Mapping[int, Iterable[str]]) -> None:
        self.texts = {key: iter(text) for key, text in texts.items()}
        self.asked: list[list[int]] = []

    def generate(
        self, prompts: Sequence[Prompt], samples: int, sampling: Sampling, seed: int, progress: Any = None
    ) -> list[list[Completion]]:
        self.asked.append([p.key for p in prompts])
        said = [[next(self.texts[p.key]) for _ in range(samples)] for p in prompts]
        return [[_completion(text) for text in row] for row in said]


def _completion(text: str) -> Completion:
    tokens = torch.tensor([*TOKENIZER.encode(text, add_special_tokens=False), END])
    logp = torch.zeros(len(tokens))
    return Completion(tokens, logp, logp, "stop", text)
