"""How the embedded engine works: slots refilled as soon as they are free, prompts computed once, memory bounded."""

from __future__ import annotations

import pytest
import torch

from posttrain.rollout import embedded
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.trajectory import PosttrainError, Prompt, Sampling
from tiny_models import make_policy, random_tokens

SAMPLING = Sampling(max_tokens=14, temperature=1.3)


def make_prompts(lengths: tuple[int, ...]) -> list[Prompt]:
    draw = torch.Generator().manual_seed(4)
    return [Prompt(random_tokens(n, draw), key=i) for i, n in enumerate(lengths)]


@pytest.fixture
def policy(tiny_tokenizer):
    policy = make_policy("llama", tiny_tokenizer)
    policy.model.generation_config.eos_token_id = list(range(2, 9))
    assert policy.packs
    return policy


@pytest.fixture
def calls(policy):
    """`(rows, tokens)` of every call of the model."""
    seen: list[tuple[int, int]] = []
    policy.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return seen


def expected_calls(lengths: list[int], prompts: list[int], rows: int) -> list[tuple[int, int]]:
    """What continuous batching takes: lengths of the completions and of their prompts, in the order of waiting."""
    waiting = list(zip(lengths, prompts, strict=True))
    running: list[int] = []
    seen: list[tuple[int, int]] = []
    while waiting or running:
        fresh, waiting = waiting[: rows - len(running)], waiting[rows - len(running) :]
        if fresh:
            seen.append((1, sum({p for _, p in fresh})))  # a prompt once; those of the test differ in length
        running = [n - 1 for n in [*running, *(n for n, _ in fresh)]]
        running = [n for n in running if n]
        if running:
            seen.append((len(running), 1))
    return seen


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 64])
def test_slots_are_refilled_at_once(policy, calls, rows):
    """The calls of the model, one by one, against a simulation that knows how long each completion gets."""
    prompts = make_prompts((5, 2, 9, 4))
    found = EmbeddedEngine(policy, rows=rows).generate(prompts, 4, SAMPLING, seed=0)
    lengths = [len(c.tokens) for row in found for c in row]
    assert len(set(lengths)) > 3
    assert calls == expected_calls(lengths, [len(p.tokens) for p in prompts for _ in range(4)], rows)


def test_a_full_batch_takes_fewer_calls_than_waves_would(policy, calls):
    prompts = make_prompts((3, 3, 3))
    found = EmbeddedEngine(policy, rows=4).generate(prompts, 8, SAMPLING, seed=0)
    lengths = [len(c.tokens) for row in found for c in row]
    decodes = sum(tokens == 1 for _, tokens in calls)
    waves = sum(max(lengths[i : i + 4]) - 1 for i in range(0, len(lengths), 4))
    assert decodes < 0.8 * waves


def test_a_prompt_is_computed_once_for_all_its_samples(policy, calls):
    prompts = make_prompts((5, 2, 9))
    EmbeddedEngine(policy, rows=64).generate(prompts, 6, SAMPLING, seed=0)
    assert calls[0] == (1, 16)
    assert calls[1][1] == 1


def test_long_prompts_are_computed_in_several_rows(policy, calls, monkeypatch):
    prompts = make_prompts((5, 2, 9, 4))
    whole = EmbeddedEngine(policy).generate(prompts, 2, SAMPLING, seed=0)
    calls.clear()
    monkeypatch.setattr(embedded, "PREFILL_TOKENS", 8)
    found = EmbeddedEngine(policy).generate(prompts, 2, SAMPLING, seed=0)
    assert calls[:3] == [(1, 7), (1, 9), (1, 4)]
    assert [[c.tokens.tolist() for c in row] for row in found] == [[c.tokens.tolist() for c in row] for row in whole]


def test_memory_for_keys_and_values_limits_the_rows(policy, calls, monkeypatch):
    prompts = make_prompts((10, 2, 9, 4))
    whole = EmbeddedEngine(policy).generate(prompts, 2, SAMPLING, seed=0)
    assert max(rows for rows, _ in calls) > 3
    calls.clear()
    a_row = 2 * 2 * 2 * 8 * (10 + 14) * 4  # keys and values, layers, key heads, width, tokens, bytes of fp32
    monkeypatch.setattr(embedded, "CACHE_BYTES", 3 * a_row)
    found = EmbeddedEngine(policy).generate(prompts, 2, SAMPLING, seed=0)
    assert max(rows for rows, _ in calls) == 3
    assert [[c.tokens.tolist() for c in row] for row in found] == [[c.tokens.tolist() for c in row] for row in whole]
    monkeypatch.setattr(embedded, "CACHE_BYTES", 1)
    calls.clear()
    EmbeddedEngine(policy).generate(prompts, 2, SAMPLING, seed=0)
    assert max(rows for rows, _ in calls) == 1


def test_a_model_that_does_not_pack_is_refused(tiny_tokenizer):
    policy = make_policy("mamba", tiny_tokenizer)
    with pytest.raises(PosttrainError, match=r"MambaForCausalLM is not: take engine_for\(policy\)") as error:
        EmbeddedEngine(policy).generate(make_prompts((3,)), 1, SAMPLING, seed=0)
    assert "\n" not in str(error.value)
