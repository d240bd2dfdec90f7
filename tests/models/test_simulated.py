"""Training in a simulated precision: the products by hand, all three of them, and what stays as it is."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain import methods
from posttrain.models.adapters import add_lora
from posttrain.models.causal import CausalPolicy
from posttrain.models.float_format import FloatFormat
from posttrain.models.simulated import SimulatedPrecision, linear_layers
from posttrain.trajectory import PosttrainError
from tiny_training import TOKENIZER, demonstrations, make_dropout_model, make_policy, offline, online, same, weights

THREE = SimulatedPrecision(FloatFormat(8, 3, "truncate"))


def layer(policy: CausalPolicy) -> nn.Linear:
    return linear_layers(policy)[0]


def gradients(policy: CausalPolicy, precision: SimulatedPrecision, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """Output of a layer, and gradients of its inputs and weight."""
    held, x = layer(policy), x.clone().requires_grad_()
    held.weight.grad = None
    with precision.applied(policy):
        y = held(x)
        y.backward(dy)
    assert x.grad is not None
    assert held.weight.grad is not None
    return y.detach(), x.grad, held.weight.grad


@pytest.mark.limit("reduced-precision")
@pytest.mark.parametrize("passes", ["all", "forward", "backward"])
def test_the_three_products_by_hand(passes: str) -> None:
    policy = make_policy()
    weight = layer(policy).weight.detach()
    draw = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(2, 5, n, generator=draw) for n in (weight.shape[1], weight.shape[0]))

    def bits(t: Tensor) -> Tensor:
        """The card's mask of the bf16 pattern."""
        return (t.to(torch.bfloat16).view(torch.int16) & -16).view(torch.bfloat16).float()

    there, back = (bits if passes != other else torch.clone for other in ("backward", "forward"))
    y, dx, dw = gradients(policy, SimulatedPrecision(THREE.format, passes=passes), x, dy)  # type: ignore[arg-type]
    assert torch.allclose(y, there(x) @ there(weight).T, rtol=1e-6, atol=1e-7)
    assert torch.allclose(dx, back(dy) @ back(weight), rtol=1e-6, atol=1e-7)
    expected = torch.einsum("bto,bti->oi", back(dy), back(x))
    assert torch.allclose(dw, expected, rtol=1e-5, atol=1e-6)
    if passes == "all":
        assert not torch.allclose(y, x @ weight.T, rtol=1e-3)


@pytest.mark.limit("reduced-precision")
def test_bf16s_own_bits_are_training_in_bf16() -> None:
    """A model in bf16 multiplies numbers that have no bit to drop: the same step as SFT's."""
    made = methods.reduced_precision(8, 7)
    runs = [
        offline(
            m.with_settings(steps=3, batch=4, learning_rate=1e-2), demonstrations(), make_policy(dtype=torch.bfloat16)
        )
        for m in (made, methods.sft(), methods.reduced_precision(8, 2))
    ]
    losses = [[run.advance()["loss"] for _ in range(3)] for run in runs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[2] != pytest.approx(losses[1], rel=1e-3), "fewer bits are another training"


@pytest.mark.limit("reduced-precision")
def test_all_of_fp32s_bits_are_training_in_fp32() -> None:
    whole = SimulatedPrecision(FloatFormat(8, 23), bfloat16=False)
    settings = {"steps": 3, "batch": 4, "learning_rate": 1e-2}
    one = offline(methods.sft().replace(precision=whole).with_settings(**settings), demonstrations())
    other = offline(methods.sft().with_settings(**settings), demonstrations())
    for _ in range(3):
        one.advance()
        other.advance()
    for name, weight in weights(other.policy).items():
        assert torch.allclose(weights(one.policy)[name], weight, atol=1e-5), name


def test_a_loss_of_masked_operands_has_the_gradient_of_the_straight_through_estimator() -> None:
    """Rounding counts as the identity: what autograd gives where rounded operands carry their own gradients."""
    policy = make_policy()
    weight = layer(policy).weight
    x = torch.randn(3, weight.shape[1], generator=torch.Generator().manual_seed(1)).requires_grad_()
    held = SimulatedPrecision(THREE.format, passes="all")
    rx, rw = x + (held(x) - x.detach()), weight + (held(weight) - weight.detach())
    loss = F.linear(rx, rw).sum()  # its gradient is 1, which has no bit to lose
    expected = torch.autograd.grad(loss, (x, weight))
    with held.applied(policy):
        found = torch.autograd.grad(layer(policy)(x).sum(), (x, weight))
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-5, atol=1e-6)


def test_what_stays_as_it_is() -> None:
    policy = make_policy()
    before, tokens = weights(policy), torch.arange(8)[None]
    with torch.no_grad():
        plain = policy.model(tokens).logits
        with THREE.applied(policy):
            assert not torch.allclose(policy.model(tokens).logits, plain, rtol=1e-3)
        assert torch.equal(policy.model(tokens).logits, plain), "the layers are as before"
    assert same(weights(policy), before)
    assert policy.base.get_output_embeddings() not in linear_layers(policy)
    with pytest.raises(RuntimeError, match="on purpose"), THREE.applied(policy):
        raise RuntimeError("on purpose")
    assert "forward" not in layer(policy).__dict__


def test_it_is_not_taken_for_a_model_that_cannot_be_packed() -> None:
    """Packing is tried on the model as it is: rounding would make its two ways differ by whole last digits."""
    policy = make_policy()
    assert policy._packs is None
    with SimulatedPrecision(FloatFormat(8, 1, "truncate")).applied(policy):
        assert policy.packs


def test_adapters_and_online_methods_train_in_it() -> None:
    method = methods.reduced_precision().with_settings(steps=2, batch=4, learning_rate=1e-2)
    policy = add_lora(make_policy(), rank=2, seed=0)
    before = weights(policy)
    run = offline(method, demonstrations(), policy)
    run.advance()
    changed = {n for n, w in weights(policy).items() if not torch.equal(w, before[n])}
    assert changed
    assert all("lora" in name for name in changed)
    grpo = methods.grpo().replace(precision=THREE).with_settings(steps=1, batch=4, group=4, max_tokens=4, updates=2)
    assert torch.isfinite(torch.tensor(online(grpo).advance()["loss"]))


def test_a_model_without_linear_layers_is_refused() -> None:
    policy = CausalPolicy(make_dropout_model(), TOKENIZER, "gpt2")
    with pytest.raises(PosttrainError, match="gpt2 has no linear layer to simulate a precision in"):
        offline(methods.reduced_precision().with_settings(steps=1), demonstrations(), policy)


def test_a_copy_of_the_method_is_a_method_of_its_own() -> None:
    method = methods.reduced_precision(5, 2, "nearest", passes="forward")
    assert copy.deepcopy(method.precision) == method.precision
    assert method.precision == SimulatedPrecision(FloatFormat(5, 2, beyond="largest"), passes="forward")
    with pytest.raises(PosttrainError, match="a mantissa of 10 bits behind bf16"):
        methods.reduced_precision(5, 10)
    with pytest.raises(PosttrainError, match="passes is 'both'"):
        SimulatedPrecision(THREE.format, passes="both")  # type: ignore[arg-type]
