"""Experts taken apart: the same outputs, linear layers of their own, and something to calibrate on for all of them."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from posttrain.compress import files
from posttrain.compress.experts import Experts, Sent, holder, is_unfused, together, unfuse
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.method import Compression
from posttrain.compress.pipeline import compress_model
from posttrain.compress.solvers.gptq import GPTQ
from posttrain.compress.solvers.rtn import RoundToNearest
from posttrain.compress.stacks import stacks
from posttrain.compress.walk import Block, Walk
from posttrain.models.load import load
from posttrain.trajectory import PosttrainError
from tiny_models import make_policy, random_tokens

MIXTURES = ["mixtral", "qwen3-moe", "deepseek", "gpt-oss", "llama4"]


def tokens(rows: int = 4, length: int = 12) -> torch.Tensor:
    return random_tokens(rows * length, torch.Generator().manual_seed(0)).view(rows, length)


def tiny(name: str, tokenizer: Any = None, **overrides: Any) -> nn.Module:
    return make_policy(name, tokenizer, **overrides).base


@torch.no_grad()
def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


def first_block(model: nn.Module, ids: torch.Tensor) -> Block:
    return next(iter(Walk(model, stacks(model)[0], [{"input_ids": ids, "use_cache": False}])))


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_taken_apart_compute_the_same(name: str) -> None:
    model = tiny(name)
    apart = copy.deepcopy(model)
    found = unfuse(apart)
    assert found
    assert is_unfused(apart)
    assert not is_unfused(model)
    torch.testing.assert_close(logits(apart, tokens()), logits(model, tokens()), atol=1e-5, rtol=1e-5)
    layers = [m for m in apart.get_submodule(found[0]).modules() if isinstance(m, nn.Linear)]
    assert len(layers) == 3 * apart.get_submodule(found[0]).count


def test_gradients_reach_the_experts_taken_apart() -> None:
    model = tiny("mixtral")
    apart = copy.deepcopy(model)
    unfuse(apart)
    for each in (model, apart):
        each(input_ids=tokens(), use_cache=False).logits.square().mean().backward()
    whole = model.get_submodule("model.layers.0.mlp.experts").down_proj.grad
    parts = apart.get_submodule("model.layers.0.mlp.experts")
    for number in range(4):
        torch.testing.assert_close(parts.get_submodule(f"{number}.down_proj").weight.grad, whole[number])


def test_taking_apart_twice_and_dense_models_change_nothing() -> None:
    model = tiny("mixtral")
    assert unfuse(model)
    assert unfuse(model) == []
    dense = tiny("llama")
    assert unfuse(dense) == []
    assert not is_unfused(dense)


def test_experts_held_in_an_unknown_way_are_refused() -> None:
    class StrangeExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.everything = nn.Parameter(torch.zeros(2, 3, 4))

    with pytest.raises(PosttrainError, match="StrangeExperts holds its experts in a way"):
        unfuse(nn.Sequential(StrangeExperts()))


@pytest.mark.parametrize("name", MIXTURES)
def test_every_method_sees_experts_as_linear_layers(name: str) -> None:
    model = tiny(name)
    before = logits(model, tokens())
    made = Compression("rtn", RoundToNearest(Uniform(8, 0)))
    summary = compress_model(model, made, [{"input_ids": tokens(), "use_cache": False}])
    assert {n.rpartition(".")[2] for n in (s.name for s in summary.layers) if ".experts.3." in n} == (
        {"gate_proj", "up_proj", "down_proj"} if name != "llama4" else set()
    )
    assert float((logits(model, tokens()) - before).norm() / before.norm()) < 0.05


def test_a_compressed_mixture_is_read_from_its_folder(tiny_tokenizer: Any, tmp_path: Any) -> None:
    policy = make_policy("qwen3-moe", tiny_tokenizer, vocab_size=len(tiny_tokenizer))
    compress_model(policy.base, Compression("rtn", RoundToNearest(Uniform(4, 16))), [{"input_ids": tokens()}])
    files.save(policy, tmp_path / "small")
    again = load(tmp_path / "small", precision="fp32")
    torch.testing.assert_close(logits(again.base, tokens()), logits(policy.base, tokens()))


# -- on the walk -----------------------------------------------------------------------------------------------------


def test_experts_run_in_one_phase_but_share_no_input() -> None:
    model = tiny("mixtral")
    unfuse(model)
    block = first_block(model, tokens())
    gates = [p for p in block.phases if any(".gate_proj" in n for n in p)]
    downs = [p for p in block.phases if any(".down_proj" in n for n in p)]
    assert [len(p) for p in gates] == [8]  # gate and up of four experts
    assert [len(p) for p in downs] == [4]
    assert block.phases.index(gates[0]) < block.phases.index(downs[0])
    found = block.moments(gates[0])
    assert found["mlp.experts.0.gate_proj"] is found["mlp.experts.0.up_proj"]
    assert found["mlp.experts.0.gate_proj"] is not found["mlp.experts.1.gate_proj"]
    assert sum(found[f"mlp.experts.{e}.gate_proj"].count for e in range(4)) == 2 * tokens().numel()


def test_stages_of_a_dense_block_are_its_phases() -> None:
    block = first_block(tiny("llama"), tokens())
    assert block.phases == block.stages
    assert together(block.module, block.stages) == block.stages


def deaf_to_expert_2(model: nn.Module) -> nn.Module:
    """The model whose first router never sends a token to expert 2."""
    router = model.get_submodule("model.layers.0.mlp.gate")
    router.register_forward_hook(lambda m, given, out: (out[0], out[1], out[2].masked_fill(out[2] == 2, 0)))
    return model


def test_an_expert_that_no_token_reaches_is_calibrated_on_all_tokens_and_noted() -> None:
    model = deaf_to_expert_2(tiny("mixtral"))
    unfuse(model)
    experts = model.get_submodule("model.layers.0.mlp.experts")
    block = first_block(model, tokens())
    given: list[torch.Tensor] = []
    hook = experts.register_forward_pre_hook(lambda m, args: given.append(args[0]))
    stage = [n for n in block.phases[-2] if n.endswith("gate_proj")]
    found = block.moments(stage)
    hook.remove()
    assert list(block.unreached) == ["model.layers.0.mlp.experts.2"]
    assert len(block.experts) == 4
    assert found["mlp.experts.2.gate_proj"].count == tokens().numel()
    torch.testing.assert_close(found["mlp.experts.2.gate_proj"].gram, given[0].T @ given[0])
    assert experts.also == frozenset()


def test_one_warning_of_a_whole_model_tells_which_experts_no_token_reached() -> None:
    method = Compression("gptq", GPTQ(Uniform(8, 0)))
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        compress_model(deaf_to_expert_2(tiny("mixtral")), method, [{"input_ids": tokens()}])
    (one,) = seen
    assert str(one.message).startswith(
        "no calibration token reached 1 of 8 experts (model.layers.0.mlp.experts.2); they are calibrated on all tokens"
    )
    assert Path(one.filename).match("posttrain/compress/walk.py"), "warnings of torch's are not shown by commands"
    with pytest.warns(UserWarning, match=r"no calibration token reached (\d) of 8 experts \((\S+, ){3}\.\.\.\);"):
        compress_model(tiny("mixtral"), method, [{"input_ids": tokens()[:1, :1]}])


@pytest.mark.filterwarnings("ignore:no calibration token")
@pytest.mark.parametrize("name", MIXTURES)
def test_with_hardly_any_text_no_expert_becomes_garbage(name: str) -> None:
    model = tiny(name)
    before = logits(model, tokens())
    compress_model(model, Compression("gptq", GPTQ(Uniform(8, 0))), [{"input_ids": tokens()[:1, :3]}])
    assert float((logits(model, tokens()) - before).norm() / before.norm()) < 0.1


def test_watchers_see_which_tokens_an_expert_is_given_and_how_they_weigh() -> None:
    model = tiny("mixtral")
    unfuse(model)
    block = first_block(model, tokens())
    seen: list[Sent] = []
    experts, number = holder(block.module, "mlp.experts.1.down_proj") or (None, -1)
    assert isinstance(experts, Experts)
    assert number == 1
    assert holder(block.module, "self_attn.q_proj") is None
    routed: list[tuple[torch.Tensor, ...]] = []
    experts.register_forward_pre_hook(lambda m, args: routed.append(args))
    experts.get_submodule("1.down_proj").register_forward_pre_hook(lambda m, args: seen.append(experts.now))
    block.outputs()
    _, index, weights = routed[0]
    rows, slot = torch.where(index == 1)
    assert torch.equal(seen[0].tokens, rows)
    assert torch.equal(seen[0].weights, weights[rows, slot])
    assert experts.now is None


def test_token_weights_of_a_call_reach_the_tokens_that_an_expert_is_given() -> None:
    model = tiny("mixtral")
    unfuse(model)
    block = first_block(model, tokens())
    names = [f"mlp.experts.{e}.gate_proj" for e in range(4)]
    weights = torch.arange(tokens().numel(), dtype=torch.float32)
    found = block.moments(names, weights=lambda call: weights)
    assert sum(found[n].weight for n in names) == pytest.approx(2 * float(weights.sum()))
