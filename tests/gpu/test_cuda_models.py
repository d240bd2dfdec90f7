"""On a GPU: packed rows are the model's own padded rows, and likelihoods with their gradients those of the CPU."""

from __future__ import annotations

import pytest
import torch
from on_gpu import DEVICE, TOKENIZER, apart, gpu, placed, small_policy

from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.trajectory import Group
from tiny_models import PACKING, continued, make_policy, ragged_batch, random_tokens

pytestmark = gpu
# of the hidden states, compared with their size: sums in another order, and roundings of bf16
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}

ROUTED = ("mixtral", "qwen3-moe", "deepseek")


def long_batch(seed: int = 0) -> Batch:
    """Groups of hundreds of tokens, with and without a shared prompt."""
    draw = torch.Generator().manual_seed(seed)
    groups: list[Group] = [
        continued(random_tokens(120, draw, 259), [90, 130, 40, 7], draw),
        continued(random_tokens(33, draw, 259), [250], draw),
        continued(random_tokens(60, draw, 259), [200, 180], draw),
        *(continued(random_tokens(20 + 9 * i, draw, 259), [64 + 5 * i], draw) for i in range(6)),
    ]
    return Batch.of(groups)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", PACKING)
def test_packed_rows_are_padded_rows(name: str, dtype: torch.dtype) -> None:
    if dtype == torch.bfloat16 and name in ROUTED:
        pytest.skip("a token goes elsewhere where two of its experts are nearly equal")
    policy = placed(make_policy(name, TOKENIZER))
    policy.model.to(dtype)
    batch = ragged_batch()
    with torch.no_grad():
        assert policy.packs
        packed, padded = policy._packed_hidden(batch), policy._padded_hidden(batch)
    assert packed.device.type == DEVICE.type
    assert apart(packed, padded) <= TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=["fp32", "bf16"])
@pytest.mark.parametrize("window", [None, 48], ids=["whole", "window"])
def test_long_packed_rows_are_padded_rows(dtype: torch.dtype, window: int | None) -> None:
    if window is None:
        policy = small_policy(dtype)
    else:
        policy = placed(
            make_policy("mistral", TOKENIZER, vocab_size=259, max_position_embeddings=512, sliding_window=window)
        )
        policy.model.to(dtype)
    batch = long_batch()
    with torch.no_grad():
        assert policy.packs
        assert apart(policy._packed_hidden(batch), policy._padded_hidden(batch)) <= TOLERANCE[dtype]


def gradients(policy: CausalPolicy, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities, entropies, and gradients of a weighted sum of both."""
    found = policy.log_likelihood(batch.to(policy.device), entropy=True, temperature=0.7)
    assert found.entropy is not None
    weights = torch.linspace(-1, 1, len(found.logp)).to(found.logp)
    (weights * found.logp + 0.1 * found.entropy).sum().backward()
    return found.logp, found.entropy, {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral", "gemma2", "gpt2"])
def test_likelihoods_and_gradients_are_those_of_the_cpu(name: str) -> None:
    batch = ragged_batch()
    (logp, entropy, grads), (true_logp, true_entropy, true_grads) = (
        gradients(placed(make_policy(name, TOKENIZER), device), batch) for device in (DEVICE, torch.device("cpu"))
    )
    assert apart(logp, true_logp) <= 2e-5
    assert apart(entropy, true_entropy) <= 2e-5
    assert grads.keys() == true_grads.keys()
    whole, true = (torch.cat([g[n].flatten().cpu() for n in true_grads]) for g in (grads, true_grads))
    assert apart(whole, true) <= 1e-4


def test_gradients_of_long_rows_in_bf16_are_near_those_of_fp32_on_the_cpu() -> None:
    batch = long_batch()
    low, high = small_policy(torch.bfloat16), small_policy(device=torch.device("cpu"))
    (logp, _, grads), (true_logp, _, true_grads) = gradients(low, batch), gradients(high, batch)
    assert float((logp.cpu() - true_logp).detach().abs().mean()) <= 0.03
    whole, true = (torch.cat([g[n].flatten().float().cpu() for n in true_grads]) for g in (grads, true_grads))
    assert apart(whole, true) <= 0.06


def test_layers_that_are_computed_again_give_the_same_gradients() -> None:
    batch, policy = long_batch(), small_policy()
    policy.model.train()
    _, _, kept = gradients(policy, batch)
    policy.model.zero_grad()
    with policy.recomputing():
        _, _, again = gradients(policy, batch)
    assert all(apart(again[name], kept[name]) <= 1e-5 for name in kept)
