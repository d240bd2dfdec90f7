"""Tiny policies that vLLM's attention on CPUs takes (heads of 64), prompts for them, and the engine to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from conftest import make_model, make_tokenizer
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.trajectory import Completion, Prompt, Sampling

TOKENIZER = make_tokenizer()
SHAPE = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 1}
LOGP = 1e-3  # nats: two implementations of the same model in fp32, on a few dozen tokens
GREEDY = Sampling(max_tokens=24, temperature=0)


def make_policy(seed: int = 0, **config: Any) -> CausalPolicy:
    return CausalPolicy(make_model(seed, **{**SHAPE, "initializer_range": 0.08, **config}), TOKENIZER, f"tiny-{seed}")


def prompts(count: int = 4) -> list[Prompt]:
    texts = [f"number {i * 37}: " + "ab" * (i % 3) for i in range(count)]
    return [Prompt(torch.tensor(TOKENIZER.encode(text)), text=text, key=i) for i, text in enumerate(texts)]


@torch.no_grad()
def become(policy: CausalPolicy, other: CausalPolicy) -> None:
    """Give a policy another one's weights in place, as an optimizer does."""
    for mine, theirs in zip(policy.model.parameters(), other.model.parameters(), strict=True):
        mine.copy_(theirs)


def tokens(groups: Sequence[Sequence[Completion]]) -> list[list[list[int]]]:
    return [[completion.tokens.tolist() for completion in row] for row in groups]


def assert_same(found: Sequence[Sequence[Completion]], expected: Sequence[Sequence[Completion]]) -> None:
    """The same completions, with log-probabilities equal within LOGP."""
    assert tokens(found) == tokens(expected)
    for mine, theirs in zip((c for row in found for c in row), (c for row in expected for c in row), strict=True):
        assert (mine.finish, mine.text) == (theirs.finish, theirs.text)
        torch.testing.assert_close(mine.logp, theirs.logp, atol=LOGP, rtol=0)
        torch.testing.assert_close(mine.logp_full, theirs.logp_full, atol=LOGP, rtol=0)


def embedded(policy: CausalPolicy, sampling: Sampling = GREEDY) -> list[list[Completion]]:
    return EmbeddedEngine(policy).generate(prompts(), 1, sampling, 0)


@torch.no_grad()
def logits_of(policy: CausalPolicy, prompt: Prompt, completion: Completion) -> torch.Tensor:
    """`[tokens, vocab]` logits that the model itself gives where each token of the completion was drawn."""
    whole = torch.cat([prompt.tokens, completion.tokens])
    return policy.model(whole[None]).logits[0, len(prompt.tokens) - 1 : -1].float()
