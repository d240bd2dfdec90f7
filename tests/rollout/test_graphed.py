"""Decoding in blocks of steps on memory of fixed shapes: the same completions as where one looks after every token.

On the CPU the steps are not captured but called; `tests/gpu` has them as graphs.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.models.causal import CausalPolicy
from posttrain.rollout import embedded
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.graphed import BLOCK
from posttrain.rollout.static_slots import room_bucket, rows_bucket
from posttrain.trajectory import Completion, PosttrainError, Prompt, Sampling
from tiny_models import PACKING, make_policy, random_tokens

LONG = {"max_position_embeddings": 256}
SAMPLINGS = {
    "plain": Sampling(max_tokens=45, temperature=1.3),
    "greedy": Sampling(max_tokens=20, temperature=0),
    "top-k": Sampling(max_tokens=20, temperature=1.1, top_k=7),
    "top-p": Sampling(max_tokens=20, top_p=0.7),
    "stop string": Sampling(max_tokens=40, temperature=1.2, stop=("b", "7")),
    "one token": Sampling(max_tokens=1),
}


def make_prompts(lengths: tuple[int, ...]) -> list[Prompt]:
    draw = torch.Generator().manual_seed(4)
    return [Prompt(random_tokens(n, draw), key=i) for i, n in enumerate(lengths)]


def ending(policy: CausalPolicy) -> CausalPolicy:
    """One token in nine ends a completion."""
    policy.model.generation_config.eos_token_id = list(range(2, 9))
    return policy


@pytest.fixture
def policy(tiny_tokenizer: Any) -> CausalPolicy:
    made = ending(make_policy("llama", tiny_tokenizer, **LONG))
    assert made.packs
    return made


@pytest.fixture(autouse=True)
def by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "suits", lambda policy: True)


def same(found: list[list[Completion]], expected: list[list[Completion]]) -> None:
    assert [len(row) for row in found] == [len(row) for row in expected]
    for a, b in zip((c for row in found for c in row), (c for row in expected for c in row), strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert (a.finish, a.text) == (b.finish, b.text)
        assert torch.allclose(a.logp, b.logp, atol=1e-5)
        assert torch.allclose(a.logp_full, b.logp_full, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 3, 5, 64])
@pytest.mark.parametrize("name", SAMPLINGS)
def test_completions_are_those_of_single_steps(name: str, rows: int, policy: CausalPolicy) -> None:
    prompts = make_prompts((5, 2, 9, 4, 30))
    expected = EmbeddedEngine(policy, graphs=False).generate(prompts, 4, SAMPLINGS[name], seed=0)
    same(EmbeddedEngine(policy, rows=rows).generate(prompts, 4, SAMPLINGS[name], seed=0), expected)
    if name == "plain":
        lengths = {len(c.tokens) for row in expected for c in row}
        assert min(lengths) < BLOCK < max(lengths), "some end inside the first block, others behind it"


@pytest.mark.parametrize("name", [n for n in PACKING if n not in ("qwen3-moe", "mixtral")])
def test_every_architecture(name: str, tiny_tokenizer: Any) -> None:
    policy = ending(make_policy(name, tiny_tokenizer, **LONG))
    prompts = make_prompts((5, 2, 9))
    expected = EmbeddedEngine(policy, graphs=False).generate(prompts, 3, SAMPLINGS["plain"], seed=1)
    same(EmbeddedEngine(policy, rows=4).generate(prompts, 3, SAMPLINGS["plain"], seed=1), expected)


@settings(max_examples=15, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), samples=st.integers(1, 4), rows=st.integers(1, 9),
    tokens=st.integers(1, 50), seed=st.integers(0, 99),
)  # fmt: skip
def test_any_request(lengths: list[int], samples: int, rows: int, tokens: int, seed: int) -> None:
    prompts, sampling = make_prompts(tuple(lengths)), Sampling(max_tokens=tokens, temperature=1.2)
    expected = EmbeddedEngine(SHARED, graphs=False).generate(prompts, samples, sampling, seed)
    same(EmbeddedEngine(SHARED, rows=rows).generate(prompts, samples, sampling, seed), expected)


def _shared() -> CausalPolicy:
    from conftest import make_tokenizer

    return ending(make_policy("qwen2-window", make_tokenizer(), **LONG))


SHARED = _shared()


def test_memory_is_kept_as_long_as_the_weights_stay_where_they_are(policy: CausalPolicy) -> None:
    engine, prompts = EmbeddedEngine(policy), make_prompts((5, 9))
    engine.generate(prompts, 2, SAMPLINGS["plain"], seed=0)
    first = engine._decoder
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.mul_(1.1)  # as an optimizer does it
    again = engine.generate(prompts, 2, SAMPLINGS["plain"], seed=0)
    assert engine._decoder is first
    same(again, EmbeddedEngine(policy, graphs=False).generate(prompts, 2, SAMPLINGS["plain"], seed=0))
    for parameter in policy.model.parameters():
        parameter.data = parameter.data * 0.9
    moved = engine.generate(prompts, 2, SAMPLINGS["plain"], seed=0)
    assert engine._decoder is not first
    same(moved, EmbeddedEngine(policy, graphs=False).generate(prompts, 2, SAMPLINGS["plain"], seed=0))
    engine.generate(make_prompts((150,)), 2, SAMPLINGS["plain"], seed=0)
    assert engine._decoder.slots.capacity == 256


def test_weights_that_diverged_are_refused_and_nothing_of_them_is_kept(policy: CausalPolicy) -> None:
    engine, prompts = EmbeddedEngine(policy), make_prompts((5, 9))
    expected = engine.generate(prompts, 2, SAMPLINGS["plain"], seed=0)
    weight = policy.base.model.layers[1].mlp.down_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    with pytest.raises(PosttrainError, match="not finite"):
        engine.generate(prompts, 2, SAMPLINGS["plain"], seed=0)
    with torch.no_grad():
        weight.copy_(kept)
    same(engine.generate(prompts, 2, SAMPLINGS["plain"], seed=0), expected)


def test_progress_counts_every_completion(policy: CausalPolicy) -> None:
    seen: list[tuple[int, int]] = []
    EmbeddedEngine(policy, rows=3).generate(
        make_prompts((5, 2, 9)), 3, SAMPLINGS["plain"], seed=0, progress=lambda *at: seen.append(at)
    )
    assert seen == sorted(set(seen))
    assert seen[-1] == (9, 9)


def test_prompts_are_computed_in_pieces_that_fit(policy: CausalPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "PREFILL_TOKENS", 12)
    shapes: list[tuple[int, int]] = []
    policy.model.model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    prompts = make_prompts((5, 6, 9, 30))
    found = EmbeddedEngine(policy).generate(prompts, 2, SAMPLINGS["plain"], seed=0)
    assert [shape for shape in shapes if shape[0] == 1 and shape[1] > 1] == [(1, 11), (1, 9), (1, 30)]
    same(found, EmbeddedEngine(policy, graphs=False).generate(prompts, 2, SAMPLINGS["plain"], seed=0))


def test_buckets() -> None:
    assert [rows_bucket(n) for n in (1, 2, 3, 5, 32, 33, 48, 49, 65, 97, 200, 257)] == [
        1, 2, 4, 8, 32, 48, 48, 64, 96, 128, 256, 384,
    ]  # fmt: skip
    assert [room_bucket(n) for n in (1, 128, 129, 1000, 1024, 1025, 1537)] == [128, 128, 256, 1024, 1024, 1536, 2048]
    assert all(rows_bucket(n) >= n and room_bucket(n) >= n for n in range(1, 3000))
