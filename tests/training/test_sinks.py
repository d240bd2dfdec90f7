"""Whole models whose tied embeddings add their gradients straight to the optimizer's, beside autograd's own way."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from conftest import make_model, make_tokenizer
from posttrain.models.causal import CausalPolicy
from posttrain.models.layers import replacements
from posttrain.models.sink_layers import looked_up, projected, takes_product, takes_rows
from posttrain.native import library
from posttrain.objective.batch import Batch
from posttrain.objective.sink import close_sink, open_sink, sink_of
from posttrain.training import optim
from posttrain.training.optim import MasterAdamW
from posttrain.training.settings import Settings
from posttrain.trajectory import Group, Trajectory

NATIVE = library.library() is not None and library.level() is not None
native = pytest.mark.skipif(not NATIVE, reason="the C functions are not there, or switched off")
BF16 = torch.bfloat16
TABLE = "model.embed_tokens.weight"


class Scaled(nn.Embedding):
    """Embeddings that are multiplied, as in Gemma."""

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens) * 4


def policy_of(dtype: torch.dtype, **overrides: Any) -> CausalPolicy:
    return CausalPolicy(make_model(**overrides).to(dtype).train(), make_tokenizer(), "tiny")


def micro_batches() -> list[Batch]:
    """Two, in which tokens come several times, that of the padding (2) among them."""
    draw = torch.Generator().manual_seed(0)
    made = []
    for lengths in ((9, 14), (30,)):
        rows = [Trajectory(torch.randint(0, 40, (n,), generator=draw), torch.arange(n) > 2) for n in lengths]
        rows[0].tokens[1] = 2
        made.append(Batch.of([Group([row]) for row in rows]))
    return made


def backward(policy: CausalPolicy) -> None:
    for micro in micro_batches():
        (-policy.log_likelihood(micro).logp.sum()).backward()


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize("tied", [True, False])
def test_in_fp32_they_are_autograds(tied: bool) -> None:
    policy = policy_of(torch.float32, tie_word_embeddings=tied)
    plain = CausalPolicy(copy.deepcopy(policy.model), policy.tokenizer, "tiny")
    wanted = ["lm_head.weight", TABLE] if not tied else [TABLE]
    named = dict(policy.model.named_parameters())
    masters = {name: named[name].detach().clone().requires_grad_() for name in wanted}
    for name, master in masters.items():
        open_sink(named[name], master)
    backward(policy)
    backward(plain)
    for name, parameter in plain.model.named_parameters():
        found = named[name].grad
        if name in masters:
            assert found is None or not NATIVE
            ways = [g for g in (found, masters[name].grad) if g is not None]
            found = torch.stack(ways).sum(0)
            close_sink(named[name], masters[name])
        assert found is not None
        assert parameter.grad is not None
        assert relative(found, parameter.grad) < 1e-6


@pytest.mark.parametrize("tied", [True, False])
def test_in_bf16_they_are_nearer_to_the_truth(tied: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(BF16, tie_word_embeddings=tied)
    plain, truth = (CausalPolicy(copy.deepcopy(policy.model), policy.tokenizer, "tiny") for _ in range(2))
    truth.model.float()
    with_sinks = MasterAdamW(policy.trainable_parameters(), Settings())
    monkeypatch.setattr(optim, "open_sink", lambda *_: None)
    without = MasterAdamW(plain.trainable_parameters(), Settings())
    for one in (policy, plain, truth):
        backward(one)
    found, before = with_sinks.gradients(), without.gradients()
    exact = {name: p.grad for name, p in truth.model.named_parameters() if p.grad is not None}
    assert found.keys() == before.keys() == exact.keys()
    assert all(g.dtype == torch.float32 for g in found.values())
    for name in found:
        limit = 1.01 * relative(before[name], exact[name])  # most of it is the forward pass in bf16
        assert relative(found[name], exact[name]) <= limit, name
        if name != TABLE and name != "lm_head.weight":
            assert torch.equal(found[name], before[name]), name


@native
def test_the_tables_gradient_never_exists_in_bf16() -> None:
    policy = policy_of(BF16)
    table, seen = policy.base.get_input_embeddings().weight, []
    table.register_post_accumulate_grad_hook(lambda t: seen.append(t.grad is not None))
    optimizer = MasterAdamW(policy.trainable_parameters(), Settings())
    backward(policy)
    assert not any(seen)
    assert table.grad is None
    assert optimizer.gradients()[TABLE].dtype == torch.float32


def test_the_optimizer_does_with_them_as_with_others() -> None:
    policy = policy_of(BF16)
    optimizer = MasterAdamW(policy.trainable_parameters(), replace(Settings(), skip_grad_norm=1e-9))
    before = {name: p.detach().clone() for name, p in policy.trainable_parameters()}
    backward(policy)
    once = {name: g.clone() for name, g in optimizer.gradients().items()}
    kept = optimizer.take_gradients()
    assert not optimizer.gradients()
    backward(policy)  # as the second pass of a normaliser
    assert all(torch.equal(optimizer.gradients()[name], g) for name, g in once.items())
    optimizer.put_gradients(kept)
    assert all(torch.equal(optimizer.gradients()[name], g) for name, g in once.items())
    optimizer.divide(2.0, lambda name: name == TABLE)
    torch.testing.assert_close(optimizer.gradients()[TABLE], once[TABLE] / 2)
    backward(policy)
    torch.testing.assert_close(optimizer.gradients()[TABLE], 1.5 * once[TABLE], rtol=1e-5, atol=1e-6)
    optimizer.step(1e-3)  # is skipped: its norm is too large
    assert not optimizer.gradients()
    assert all(torch.equal(p, before[name]) for name, p in policy.trainable_parameters())
    backward(policy)
    optimizer.only(lambda name: name != TABLE)
    assert TABLE not in optimizer.gradients()
    optimizer.close()
    table = policy.base.get_input_embeddings().weight
    assert sink_of(table) is None
    backward(policy)
    assert table.grad is not None


def test_a_frozen_table_has_none() -> None:
    policy = policy_of(BF16)
    policy.base.get_input_embeddings().weight.requires_grad_(False)
    optimizer = MasterAdamW(policy.trainable_parameters(), Settings())
    backward(policy)
    assert TABLE not in optimizer.names
    assert len(optimizer.gradients()) == len(optimizer.names)


@native
def test_tables_that_do_more_are_left_alone() -> None:
    tables = {
        "plain": nn.Embedding(9, 4),
        "padded": nn.Embedding(9, 4, padding_idx=3),
        "scaled": Scaled(9, 4),
        "sparse": nn.Embedding(9, 4, sparse=True),
        "by count": nn.Embedding(9, 4, scale_grad_by_freq=True),
        "cut": nn.Embedding(9, 4, max_norm=1.0),
    }
    for table in tables.values():
        open_sink(table.weight, table.weight.detach().clone().requires_grad_())
    model = nn.ModuleDict(tables)
    taken = {id(module) for module, _ in replacements(model)}
    assert {name for name, table in tables.items() if id(table) in taken} == {"plain", "padded"}
    assert not takes_rows(nn.Embedding(9, 4))  # no sink


@pytest.mark.parametrize("padding", [None, 3])
def test_a_lookup_is_that_of_torch(padding: int | None) -> None:
    torch.manual_seed(0)
    table, tokens, given = nn.Embedding(9, 4, padding_idx=padding), torch.randint(9, (2, 20)), torch.randn(2, 20, 4)
    wanted = table(tokens)
    wanted.backward(given)
    plain, table.weight.grad = table.weight.grad, None
    master = table.weight.detach().clone().requires_grad_()
    open_sink(table.weight, master)
    found = looked_up(table, tokens)
    assert torch.equal(found, wanted)
    found.backward(given, retain_graph=True)
    assert table.weight.grad is None
    assert master.grad is not None
    torch.testing.assert_close(master.grad, plain)
    close_sink(table.weight, master)
    found.backward(given)  # was made while it was open
    torch.testing.assert_close(table.weight.grad, plain)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_a_projection_is_that_of_torch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layer, plain = (nn.Linear(24, 37, bias=False).to(dtype) for _ in range(2))
    plain.load_state_dict(layer.state_dict())
    master = layer.weight.detach().float().requires_grad_()
    open_sink(layer.weight, master)
    given, inputs = torch.randn(2, 9, 37).to(dtype), [torch.randn(2, 9, 24).to(dtype).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    found, wanted = projected(layer, inputs[0]), plain(inputs[1])
    assert torch.equal(found, wanted)
    wanted.backward(given)
    assert plain.weight.grad is not None
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-2, "atol": 5e-2}
    for times in (1, 2):
        found.backward(given, retain_graph=True)
        assert layer.weight.grad is None
        assert master.grad is not None
        torch.testing.assert_close(master.grad, times * plain.weight.grad.float(), **tolerance)
    assert inputs[0].grad is not None
    assert inputs[1].grad is not None
    torch.testing.assert_close(inputs[0].grad, 2 * inputs[1].grad)
    close_sink(layer.weight, master)
    found.backward(given)  # was made while it was open
    torch.testing.assert_close(layer.weight.grad, plain.weight.grad, **tolerance)


def test_linear_layers_that_do_more_are_left_alone() -> None:
    class Doubled(nn.Linear):
        def forward(self, inputs: Tensor) -> Tensor:
            return 2 * super().forward(inputs)

    layers = [nn.Linear(4, 3, bias=False), nn.Linear(4, 3), Doubled(4, 3, bias=False)]
    for layer in layers:
        open_sink(layer.weight, layer.weight.detach().clone().requires_grad_())
    assert [takes_product(layer) for layer in layers] == [True, False, False]
    assert not takes_product(nn.Linear(4, 3, bias=False))  # no sink
