"""Expert routing: recorded, replayed, and refused where it is not understood."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from posttrain.models.causal import CausalPolicy
from posttrain.models.routing import OWN, record_experts, replay_experts, routers, scattered
from posttrain.objective.batch import Batch
from posttrain.trajectory import PosttrainError
from tiny_models import make_policy, ragged_batch

MIXTURES = ("mixtral", "qwen3-moe", "qwen3-moe-plain", "gpt-oss")  # the last is computed padded
LAYERS, ACTIVE = 2, 2


@pytest.fixture(params=MIXTURES)
def policy(request: Any, tiny_tokenizer: Any) -> CausalPolicy:
    return make(request.param, tiny_tokenizer)


def make(name: str, tokenizer: Any, seed: int = 0, **overrides: Any) -> CausalPolicy:
    if name == "qwen3-moe-plain":
        return make_policy("qwen3-moe", tokenizer, seed, norm_topk_prob=False, **overrides)
    return make_policy(name, tokenizer, seed, **overrides)


def other_experts(batch: Batch, seed: int = 0) -> list[Tensor]:
    """Two different experts of four for every token, at random."""
    draw = torch.Generator().manual_seed(seed)
    return [
        torch.rand(len(t), LAYERS, 4, generator=draw).argsort(-1)[..., :ACTIVE].to(torch.int16) for t in batch.tokens
    ]


def test_routers_are_found_in_the_order_of_layers(policy: CausalPolicy, tiny_model: Any) -> None:
    assert len(routers(policy.model)) == LAYERS
    assert routers(tiny_model) == []


def test_what_is_recorded_is_what_the_router_chose(policy: CausalPolicy) -> None:
    tokens = torch.arange(10)[None]
    seen: list[Tensor] = []
    hooks = [r.register_forward_hook(lambda m, a, out: seen.append(out[2])) for r in routers(policy.model)]
    with record_experts(policy.model) as recorder:
        policy.model(tokens)
    for hook in hooks:
        hook.remove()
    found = recorder.take()
    assert found.shape == (10, LAYERS, ACTIVE)
    for layer in range(LAYERS):
        assert torch.equal(found[:, layer].long(), seen[layer])
    assert len(found[:, 0].unique(dim=0)) > 1  # tokens go to different experts


def test_e_replaying_its_own_experts_changes_nothing(policy: CausalPolicy) -> None:
    tokens = torch.arange(10)[None]
    with record_experts(policy.model) as recorder:
        plain = policy.model(tokens).logits
    with replay_experts(policy.model, recorder.take()):
        replayed = policy.model(tokens).logits
    torch.testing.assert_close(replayed, plain, rtol=1e-5, atol=1e-6)


def test_other_experts_are_followed(policy: CausalPolicy) -> None:
    tokens = torch.arange(10)[None]
    plain = policy.model(tokens).logits
    forced = torch.tensor([3, 0], dtype=torch.int16).expand(10, LAYERS, ACTIVE)
    with replay_experts(policy.model, forced), record_experts(policy.model) as recorder:
        changed = policy.model(tokens).logits
    assert torch.equal(recorder.take(), forced)
    assert float((changed - plain).detach().abs().max()) > 1e-3
    torch.testing.assert_close(policy.model(tokens).logits, plain)  # outside the block it is as before


def test_the_weights_of_a_forced_set_are_those_of_a_router_that_knows_no_other_expert(tiny_tokenizer: Any) -> None:
    policy = make("mixtral", tiny_tokenizer)
    tokens = torch.arange(6)[None]
    forced = torch.tensor([2, 0], dtype=torch.int16).expand(6, LAYERS, ACTIVE)
    with replay_experts(policy.model, forced):
        found = policy.model(tokens).logits

    def masked(module: Any, inputs: Any, output: Any) -> Any:
        logits = output[0].clone()
        logits[:, [1, 3]] = float("-inf")
        weights, index = logits.softmax(-1).topk(ACTIVE)
        return logits, weights / weights.sum(-1, keepdim=True), index

    hooks = [r.register_forward_hook(masked) for r in routers(policy.model)]
    expected = policy.model(tokens).logits
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_gate_keeps_its_gradient(tiny_tokenizer: Any) -> None:
    policy = make("mixtral", tiny_tokenizer)
    forced = torch.tensor([2, 0], dtype=torch.int16).expand(6, LAYERS, ACTIVE)
    with replay_experts(policy.model, forced):
        policy.model(torch.arange(6)[None]).logits.square().sum().backward()
    for router in routers(policy.model):
        assert float(router.weight.grad.abs().max()) > 1e-6
    unused = policy.model.model.layers[0].mlp.experts.gate_up_proj.grad[[1, 3]]
    assert bool((unused == 0).all())


# -- batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_has_its_experts_recorded_and_replayed(policy: CausalPolicy) -> None:
    batch = ragged_batch()
    with torch.no_grad():
        plain = policy.log_likelihood(batch, experts=True)
        assert plain.experts is not None
        assert [len(e) for e in plain.experts] == [
            len(t) if not policy.packs else int(batch.place[batch.sequence == s].max())
            for s, t in enumerate(batch.tokens)
        ]
        batch.experts = plain.experts
        again = policy.log_likelihood(batch)
        torch.testing.assert_close(again.logp, plain.logp, rtol=1e-5, atol=1e-5)
        batch.experts = other_experts(batch)
        other = policy.log_likelihood(batch)
    assert float((other.logp - plain.logp).abs().max()) > 1e-3


def test_a_packed_batch_replays_each_sequence_as_it_would_be_alone(tiny_tokenizer: Any) -> None:
    policy = make("mixtral", tiny_tokenizer)
    assert policy.packs
    batch = ragged_batch()
    batch.experts = other_experts(batch)
    for group in batch.group.unique():  # sequences of a group share the prompt, and so its experts
        members = (batch.group == group).nonzero()[:, 0].tolist()
        for s in members[1:]:
            first = batch.tokens[members[0]]
            shared = 0
            while shared < min(len(first), len(batch.tokens[s])) and first[shared] == batch.tokens[s][shared]:
                shared += 1
            batch.experts[s][:shared] = batch.experts[members[0]][:shared]
    with torch.no_grad():
        together = policy.log_likelihood(batch).logp
        alone = []
        for s, tokens in enumerate(batch.tokens):
            with replay_experts(policy.model, batch.experts[s]):
                logits = policy.model(tokens[None]).logits[0].log_softmax(-1)
            places = batch.place[batch.sequence == s]
            alone.append(logits[places - 1, tokens[places]])
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_micro_batches_and_splits_carry_the_experts(tiny_tokenizer: Any) -> None:
    policy = make("qwen3-moe", tiny_tokenizer)
    batch = ragged_batch()
    with torch.no_grad():
        batch.experts = policy.log_likelihood(batch, experts=True).experts
    batch.experts = [e.flip(1) for e in batch.experts or ()]  # the layers' experts exchanged: not what it would choose
    with torch.no_grad():
        whole = policy.log_likelihood(batch).logp
        for part in batch.split(12, keep_groups=False):
            found = batch.sum(whole), part.sum(policy.log_likelihood(part).logp)
            order = [next(i for i, t in enumerate(batch.tokens) if t is tokens) for tokens in part.tokens]
            torch.testing.assert_close(found[1], found[0][order], rtol=1e-4, atol=1e-4)


def test_unknown_experts_are_left_to_the_router(tiny_tokenizer: Any) -> None:
    policy = make("mixtral", tiny_tokenizer)
    batch = ragged_batch()
    with torch.no_grad():
        plain = policy.log_likelihood(batch).logp
        batch.experts = [torch.empty(0, dtype=torch.int16) for _ in batch.tokens]
        torch.testing.assert_close(policy.log_likelihood(batch).logp, plain)
        batch.experts = other_experts(batch)
        batch.experts[3:] = [torch.empty(0, dtype=torch.int16)] * (len(batch) - 3)
        mixed = policy.log_likelihood(batch).logp
    later = batch.group[batch.sequence] > 0  # the first group alone has experts
    torch.testing.assert_close(mixed[later], plain[later], rtol=1e-5, atol=1e-5)
    assert float((mixed - plain).abs().max()) > 1e-3


def test_scattered_by_hand() -> None:
    experts = [torch.tensor([[[5]], [[6]], [[7]]]), torch.tensor([[[1]], [[2]], [[3]]]), torch.empty(0)]
    places = [torch.tensor([0, 1, 2]), torch.tensor([0, 1, 3]), torch.tensor([4])]
    assert scattered(experts, places, 6).flatten().tolist() == [5, 6, 7, 3, OWN, OWN]


# -- what is refused -------------------------------------------------------------------------------------------------


def test_a_dense_model_has_nothing_to_replay(tiny_model: Any) -> None:
    with pytest.raises(PosttrainError, match="no router"), record_experts(tiny_model):
        pass
    with pytest.raises(PosttrainError, match="no router"), replay_experts(tiny_model, torch.zeros(3, 2, 2)):
        pass


def test_a_router_that_weighs_otherwise_is_refused(tiny_tokenizer: Any) -> None:
    policy = make("deepseek", tiny_tokenizer)  # sigmoids
    with pytest.raises(PosttrainError, match="DeepseekV3TopkRouter weighs"), record_experts(policy.model):
        policy.model(torch.arange(5)[None])


def test_experts_of_another_model_are_refused(tiny_tokenizer: Any) -> None:
    policy = make("mixtral", tiny_tokenizer)
    with pytest.raises(PosttrainError, match="2 layers"), replay_experts(policy.model, torch.zeros(5, 3, 2)):
        pass
    with (
        pytest.raises(PosttrainError, match="another model or other tokens"),
        replay_experts(policy.model, torch.zeros(5, 2, 3, dtype=torch.int16)),
    ):
        policy.model(torch.arange(5)[None])


def test_gradient_checkpointing_is_refused(tiny_tokenizer: Any) -> None:
    policy = make("mixtral", tiny_tokenizer)
    policy.model.gradient_checkpointing_enable()
    with (
        pytest.raises(PosttrainError, match="gradient checkpointing"),
        replay_experts(policy.model, torch.zeros(5, 2, 2, dtype=torch.int16)),
    ):
        pass
