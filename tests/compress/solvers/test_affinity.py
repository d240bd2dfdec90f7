"""Affinity guidance: GPTQ where affinities are equal, tokens of weight two, and shared experts by their gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from posttrain.compress.calls import Batch
from posttrain.compress.experts import Experts, unfuse
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.method import Compression
from posttrain.compress.moments import InputMoments
from posttrain.compress.pipeline import compress_model
from posttrain.compress.solvers.affinity import AffinityGPTQ, shared_gates
from posttrain.compress.solvers.gptq import GPTQ
from posttrain.compress.stacks import stacks
from posttrain.compress.walk import Block, Walk
from tiny_models import SHAPE, make_policy, random_tokens

pytestmark = pytest.mark.limit("moequant")


def text(rows: int = 16, length: int = 12) -> list[Batch]:
    ids = random_tokens(rows * length, torch.Generator().manual_seed(0)).view(rows, length)
    return [{"input_ids": ids[: rows // 2], "use_cache": False}, {"input_ids": ids[rows // 2 :], "use_cache": False}]


def mixture(affinities: float | None = None, name: str = "mixtral", **overrides: Any) -> nn.Module:
    """affinities: in the place of the router's weights."""
    model = make_policy(name, None, **{"num_hidden_layers": 1, **overrides}).base
    if affinities is not None:
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(
                lambda m, i, out: (out[0], torch.full_like(out[1], affinities), out[2])
            )
    return model


def compressed(model: nn.Module, solver: Any) -> Tensor:
    compress_model(model, Compression("m", solver), text())
    return model(**text()[0]).logits.detach()


def opened(model: nn.Module) -> Block:
    unfuse(model)
    return next(iter(Walk(model, stacks(model)[0], text())))


@pytest.mark.parametrize("affinity", [1.0, 0.25])  # a top-1 router that renormalises gives 1
def test_with_equal_affinities_it_is_gptq(affinity: float) -> None:
    found = [compressed(mixture(affinity), solver(Uniform(3, 0))) for solver in (AffinityGPTQ, GPTQ)]
    torch.testing.assert_close(*found, atol=1e-6, rtol=0)


def test_in_a_dense_model_it_is_gptq() -> None:
    found = [compressed(make_policy("qwen2", None).base, s(Uniform(3, 0))) for s in (AffinityGPTQ, GPTQ)]
    assert torch.equal(*found)


def test_with_its_own_affinities_it_is_not_gptq() -> None:
    found = [compressed(mixture(), solver(Uniform(3, 0))) for solver in (AffinityGPTQ, GPTQ)]
    assert not torch.allclose(*found)


def test_a_token_of_weight_two_counts_as_two() -> None:
    x = torch.randn(20, 4, generator=torch.Generator().manual_seed(0))
    weighted, doubled = InputMoments(4), InputMoments(4)
    weighted.add(x, torch.tensor([2.0] * 5 + [1.0] * 15))
    doubled.add(torch.cat([x, x[:5]]))
    torch.testing.assert_close(weighted.hessian, doubled.hessian)


def test_the_hessian_of_an_expert_is_weighed_by_the_affinity_once() -> None:
    block = opened(mixture())
    experts = block.module.get_submodule("mlp.experts")
    assert isinstance(experts, Experts)
    routed: list[tuple[Tensor, ...]] = []
    hook = experts.register_forward_pre_hook(lambda m, given: routed.append(given))
    block.outputs()
    hook.remove()
    gate = next(p for p in block.phases if any(n.endswith("gate_proj") for n in p))
    found = AffinityGPTQ().statistics(block, gate)
    for number in range(4):
        gram, weight = torch.zeros(32, 32), 0.0
        for hidden, index, weights in routed:
            for token, slot in torch.nonzero(index == number).tolist():
                gram += weights[token, slot] * torch.outer(hidden[token], hidden[token])
                weight += float(weights[token, slot])
        torch.testing.assert_close(found[f"mlp.experts.{number}.gate_proj"].gram, gram, atol=1e-3, rtol=1e-4)
        assert found[f"mlp.experts.{number}.up_proj"].weight == pytest.approx(weight, rel=1e-4)


def test_attention_counts_all_tokens_alike() -> None:
    block = opened(mixture())
    found = AffinityGPTQ().statistics(block, block.phases[0])
    assert set(found) == {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"}
    assert found["self_attn.q_proj"].weight == found["self_attn.q_proj"].count == 16 * 12


def test_down_projections_see_what_the_compressed_experts_give() -> None:
    block = opened(mixture())
    down = block.phases[-1]
    before = AffinityGPTQ().statistics(block, down)
    for name in (n for p in block.phases[:-1] for n in p):
        weight = block.linears[name].weight
        with torch.no_grad():
            weight.mul_(0.5)
    after = AffinityGPTQ().statistics(block, down)
    name = next(n for n in down if float(before[n].gram.abs().max()) > 0)
    assert float(after[name].gram.abs().max()) < 0.5 * float(before[name].gram.abs().max())


def test_shared_experts_are_weighed_by_their_gate() -> None:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    side = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_hidden_layers": 1}
    config = Qwen2MoeConfig(**{**SHAPE, **side, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 1})
    model = Qwen2MoeForCausalLM(config).eval()
    block = opened(model)
    assert shared_gates(block.module) == {"mlp.shared_expert": "mlp.shared_expert_gate"}
    seen: list[Tensor] = []
    shared = block.module.get_submodule("mlp.shared_expert")
    hook = shared.register_forward_pre_hook(lambda m, given: seen.append(given[0]))
    block.outputs()
    hook.remove()
    x = torch.cat([s.reshape(-1, 32) for s in seen])
    opening = torch.sigmoid(x @ block.module.get_submodule("mlp.shared_expert_gate").weight.T)
    stage = next(p for p in block.phases if "mlp.shared_expert.gate_proj" in p)
    found = AffinityGPTQ().statistics(block, stage)
    assert set(found) == set(stage)
    torch.testing.assert_close(found["mlp.shared_expert.gate_proj"].gram, (opening * x).T @ x, atol=1e-3, rtol=1e-4)
    assert found["mlp.shared_expert_gate"].weight == len(x)
    compress_model(model, Compression("m", AffinityGPTQ(Uniform(8, 0))), text())


@pytest.mark.filterwarnings("ignore:no calibration token")
def test_experts_that_no_token_reaches_are_named_and_no_garbage() -> None:
    model = mixture()
    before = model(**text()[0]).logits.detach()
    few = [{"input_ids": text()[0]["input_ids"][:1, :3], "use_cache": False}]
    compress_model(model, Compression("m", AffinityGPTQ(Uniform(8, 0))), few)
    after = model(**text()[0]).logits.detach()
    assert float((after - before).norm() / before.norm()) < 0.1
