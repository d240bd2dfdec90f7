"""The row-wise functions stand in for a model's norms and gated units only where they compute the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from conftest import make_model, make_tokenizer
from posttrain.models.attention import packed_attention
from posttrain.models.causal import CausalPolicy
from posttrain.models.layers import replaced, replacements
from posttrain.native import library
from posttrain.objective.batch import Batch
from posttrain.trajectory import Group, Trajectory

pytestmark = pytest.mark.skipif(library.library() is None, reason="posttrain was built without its C functions")


class OneMoreRMSNorm(nn.Module):
    """A norm whose weight is its distance from 1, as in Gemma."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(width)), 1e-6

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + self.eps) * (1 + self.weight)


def test_norms_and_gated_units_of_a_model_are_found() -> None:
    model = make_model()
    kinds = {type(module).__name__ for module, _ in replacements(model)}
    assert kinds == {"LlamaRMSNorm", "LlamaMLP"}


def test_a_norm_that_computes_something_else_is_left_alone() -> None:
    assert replacements(nn.Sequential(OneMoreRMSNorm(8))) == []


def test_forwards_are_put_back() -> None:
    model = make_model()
    with replaced(replacements(model)):
        assert any("forward" in m.__dict__ for m in model.modules())
    assert not any("forward" in m.__dict__ for m in model.modules())


def test_loss_and_gradients_are_those_of_the_plain_path() -> None:
    torch.manual_seed(0)
    policy = CausalPolicy(make_model(), make_tokenizer(), "tiny")
    rows = [Trajectory(torch.randint(3, 40, (n,)), torch.arange(n) > 2) for n in (9, 14, 30)]
    batch = Batch.of([Group([row]) for row in rows])

    def run(other: CausalPolicy) -> list[torch.Tensor]:
        logp = other.log_likelihood(batch).logp
        logp.sum().backward()
        return [logp.detach(), *(p.grad for p in other.model.parameters() if p.grad is not None)]

    plain = CausalPolicy(copy.deepcopy(policy.model), policy.tokenizer, "tiny")
    found = run(policy)
    with library.switched_off():
        wanted = run(plain)
    assert len(found) == len(wanted) > 10
    assert all(
        torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max())) for a, b in zip(found, wanted, strict=True)
    )


def test_checkpointed_layers_are_computed_again_by_the_same_functions() -> None:
    torch.manual_seed(0)
    model = make_model()
    tokens = torch.randint(3, 40, (12,))
    gradients = []
    for checkpointing in (False, True):
        policy = CausalPolicy(copy.deepcopy(model), make_tokenizer(), "tiny")
        if checkpointing:
            policy.base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy.model.train()
        policy.log_likelihood(Batch.of([Group([Trajectory(tokens, torch.arange(12) > 2)])])).logp.sum().backward()
        gradients.append([p.grad for p in policy.model.parameters() if p.grad is not None])
        assert not any("forward" in m.__dict__ for m in policy.model.modules())
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_copy_of_a_model_in_use_keeps_its_own_forward() -> None:
    model = make_model()
    with packed_attention(model):
        pass
    copied = copy.deepcopy(model)
    assert not any("forward" in m.__dict__ for m in copied.modules())
