"""The plain engine: the state of a model is used where there is one, and not needed where there is none."""

from __future__ import annotations

import pytest
import torch

from posttrain.rollout import plain
from posttrain.rollout.plain import PlainEngine
from posttrain.trajectory import Prompt, Sampling
from tiny_models import make_policy

PROMPTS = [Prompt(torch.tensor(t), key=i) for i, t in enumerate(([5, 9, 23, 31, 7], [40], [3, 60, 11]))]
SAMPLING = Sampling(max_tokens=10)


def play(policy, rows: int = 64):
    found = PlainEngine(policy, rows=rows).generate(PROMPTS, 4, SAMPLING, seed=0)
    return [[(c.tokens.tolist(), [round(x, 3) for x in c.logp.tolist()]) for c in row] for row in found]


@pytest.mark.parametrize("name", ["llama", "mamba", "gpt-oss", "falcon-h1"])
def test_the_state_of_the_model_changes_nothing(name, tiny_tokenizer, monkeypatch):
    """With it one token a row goes in, without it all of them; the completions are the same."""
    policy, inputs = make_policy(name, tiny_tokenizer), []
    assert policy.packs == (name == "llama")
    policy.body.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    expected = play(policy)
    assert len({len(tokens) for row in expected for tokens, _ in row}) > 1
    assert set(inputs) == {5, 1, 3}
    inputs.clear()
    monkeypatch.setattr(plain, "CACHES", ())
    assert play(policy) == expected
    assert max(inputs) > 10


@pytest.mark.parametrize("rows", [1, 3])
def test_samples_are_decoded_in_parts(rows, tiny_tokenizer):
    policy, batches = make_policy("mamba", tiny_tokenizer), []
    expected = play(policy)
    policy.body.register_forward_pre_hook(
        lambda module, args, kwargs: batches.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    assert play(policy, rows) == expected
    assert max(batches) == rows


def test_a_model_that_keeps_its_states_in_fp32_draws_in_bf16(tiny_tokenizer):
    policy = make_policy("mamba", tiny_tokenizer)
    policy.model.to(torch.bfloat16)
    assert all(len(tokens) and max(logp) <= 0 for row in play(policy) for tokens, logp in row)
