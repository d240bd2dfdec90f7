"""Completions on a GPU: greedy ones are those of `transformers`, sampled ones follow from their seed alone, and their
log-probabilities are those that training computes.
"""

from __future__ import annotations

import pytest
import torch
from on_gpu import DEVICE, TOKENIZER, apart, drawn_prompts, gpu, placed, small_policy

from posttrain.models.adapters import add_lora
from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.rollout import rollout
from posttrain.trajectory import Completion, Sampling
from tiny_models import PACKING, make_policy

pytestmark = gpu
LENGTHS = (5, 33, 17, 2, 60, 9, 33)
CPU = torch.device("cpu")
SAMPLINGS = {
    "plain": Sampling(max_tokens=40),
    "hot": Sampling(max_tokens=24, temperature=1.4),
    "top-k": Sampling(max_tokens=24, temperature=0.8, top_k=20),
    "top-p": Sampling(max_tokens=24, temperature=0.9, top_p=0.8),
    "min-p": Sampling(max_tokens=24, min_p=0.05),
}


def greedy(policy: CausalPolicy, prompt: torch.Tensor, tokens: int) -> list[int]:
    given = prompt[None].to(policy.device)
    out = policy.base.generate(
        given, attention_mask=torch.ones_like(given), do_sample=False, max_new_tokens=tokens, pad_token_id=2,
    )  # fmt: skip
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "gpt2", "gpt-neox"])
def test_greedy_is_that_of_transformers(name: str) -> None:
    policy = placed(make_policy(name, TOKENIZER, vocab_size=259))
    prompts = drawn_prompts((5, 11, 3))
    found = EmbeddedEngine(policy).generate(prompts, 1, Sampling(max_tokens=20, temperature=0), seed=0)
    for prompt, (completion,) in zip(prompts, found, strict=True):
        assert completion.tokens.tolist() == greedy(policy, prompt.tokens, 20)


def test_long_greedy_completions_of_rows_that_come_and_go() -> None:
    policy = small_policy()
    prompts = drawn_prompts(LENGTHS)
    found = EmbeddedEngine(policy, rows=3).generate(prompts, 1, Sampling(max_tokens=150, temperature=0), seed=0)
    for prompt, (completion,) in zip(prompts, found, strict=True):
        assert completion.tokens.tolist() == greedy(policy, prompt.tokens, 150)


def same(found: list[list[Completion]], expected: list[list[Completion]], tolerance: float = 0.0) -> None:
    for row, true in zip(found, expected, strict=True):
        for a, b in zip(row, true, strict=True):
            assert torch.equal(a.tokens, b.tokens)
            assert (a.finish, a.text) == (b.finish, b.text)
            if tolerance:
                assert apart(a.logp, b.logp) <= tolerance
                assert apart(a.logp_full, b.logp_full) <= tolerance
            else:
                assert torch.equal(a.logp, b.logp)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_a_seed_gives_the_same_completions_again_and_on_the_cpu(name: str) -> None:
    policy, prompts = small_policy(), drawn_prompts(LENGTHS)
    found = EmbeddedEngine(policy).generate(prompts, 4, SAMPLINGS[name], seed=3)
    same(EmbeddedEngine(policy).generate(prompts, 4, SAMPLINGS[name], seed=3), found)
    other = EmbeddedEngine(policy).generate(prompts, 4, SAMPLINGS[name], seed=4)
    assert any(
        not torch.equal(a.tokens, b.tokens)
        for x, y in zip(found, other, strict=True)
        for a, b in zip(x, y, strict=True)
    )
    on_cpu = EmbeddedEngine(small_policy(device=CPU)).generate(prompts, 4, SAMPLINGS[name], seed=3)
    same(found, on_cpu, 1e-3)


@pytest.mark.parametrize("name", SAMPLINGS)
def test_completions_do_not_depend_on_what_is_drawn_beside_them(name: str) -> None:
    policy, prompts = small_policy(), drawn_prompts(LENGTHS)
    whole = EmbeddedEngine(policy, rows=64).generate(prompts, 4, SAMPLINGS[name], seed=3)
    same(EmbeddedEngine(policy, rows=3).generate(prompts, 4, SAMPLINGS[name], seed=3), whole, 1e-3)
    same(EmbeddedEngine(policy).generate(prompts[2:4], 4, SAMPLINGS[name], seed=3), whole[2:4], 1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-4), (torch.bfloat16, 5e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_behaviour_log_probabilities_are_those_of_training(
    dtype: torch.dtype, tolerance: float, temperature: float
) -> None:
    policy = small_policy(dtype)
    groups = rollout(EmbeddedEngine(policy), drawn_prompts(LENGTHS), 4, Sampling(60, temperature), seed=1)
    batch = Batch.of(groups)
    with torch.no_grad():
        found = policy.log_likelihood(batch.to(policy.device), temperature=temperature).logp.cpu()
    assert float((found - batch.behaviour_logp_full).abs().mean()) <= tolerance


@pytest.mark.parametrize("name", PACKING)
def test_every_architecture_decodes(name: str) -> None:
    """Log-probabilities of a few tokens by the engine and by training."""
    policy = placed(make_policy(name, TOKENIZER, vocab_size=259))
    groups = rollout(EmbeddedEngine(policy), drawn_prompts((5, 9)), 3, Sampling(max_tokens=20), seed=1)
    batch = Batch.of(groups)
    with torch.no_grad():
        found = policy.log_likelihood(batch.to(policy.device)).logp.cpu()
    assert float((found - batch.behaviour_logp_full).abs().max()) <= 2e-3
    assert policy.device.type == DEVICE.type


@pytest.mark.skipif(DEVICE.type == "cpu", reason="there are no graphs on the CPU")
@pytest.mark.filterwarnings("error:.*cannot be captured")
@pytest.mark.parametrize("name", [*SAMPLINGS, "greedy"])
def test_steps_are_captured_and_follow_the_weights(name: str) -> None:
    sampling = SAMPLINGS.get(name, Sampling(max_tokens=150, temperature=0))
    policy, prompts = small_policy(), drawn_prompts(LENGTHS)
    engine, single = EmbeddedEngine(policy, rows=12), EmbeddedEngine(policy, rows=12, graphs=False)
    for _ in range(2):
        same(engine.generate(prompts, 4, sampling, seed=3), single.generate(prompts, 4, sampling, seed=3), 1e-3)
        with torch.no_grad():
            for parameter in policy.model.parameters():
                parameter.mul_(1.02)
    decoder = engine._decoder
    assert decoder is not None
    assert decoder.capturing
    assert decoder.pool is not None
    assert single._decoder is None


@pytest.mark.skipif(DEVICE.type == "cpu", reason="there are no graphs on the CPU")
def test_graphs_of_layers_with_an_adapter() -> None:
    policy = add_lora(small_policy(), rank=4, seed=1)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    prompts = drawn_prompts(LENGTHS)
    engine = EmbeddedEngine(policy)
    found = engine.generate(prompts, 2, Sampling(max_tokens=40), seed=3)
    same(found, EmbeddedEngine(policy, graphs=False).generate(prompts, 2, Sampling(max_tokens=40), seed=3), 1e-3)
    assert engine._decoder is not None
    assert engine._decoder.capturing
