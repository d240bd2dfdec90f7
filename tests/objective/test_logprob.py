from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.native import library
from posttrain.objective import logprob
from posttrain.objective.logprob import Divergence, Head, TokenStatistics, token_statistics

TOKENS, WIDTH, VOCABULARY = 7, 5, 11
HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "scale": {"scale": 0.25},
    "softcap": {"softcap": 1.5},
    "temperature": {"temperature": 0.7},
    "all": {"bias": True, "scale": 1.7, "softcap": 2.0, "temperature": 1.3},
}


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def inputs(
    tokens: int = TOKENS,
    width: int = WIDTH,
    vocabulary: int = VOCABULARY,
    *,
    bias: bool = False,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, target, and the reference's hidden and weight."""
    hidden, weight = draw(tokens, width, seed=seed, dtype=dtype), draw(vocabulary, width, seed=seed + 1, dtype=dtype)
    offset = draw(vocabulary, seed=seed + 2, dtype=dtype) if bias else None
    target = torch.randint(0, vocabulary, (tokens,), generator=torch.Generator().manual_seed(seed))
    against = draw(tokens, width, seed=seed + 3, dtype=dtype), draw(vocabulary, width, seed=seed + 4, dtype=dtype)
    for tensor in (hidden, weight, offset):
        if tensor is not None:
            tensor.requires_grad_()
    return hidden, weight, offset, target, *against


def naive_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Tensor:
    logits = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    logits = logits * options.get("scale", 1.0)
    if "softcap" in options:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    return logits / options.get("temperature", 1.0)


def naive(logits: Tensor, target: Tensor, reference: Tensor, direction: Divergence) -> TokenStatistics:
    log_p, log_q = logits.log_softmax(-1), reference.log_softmax(-1)
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    if direction == "reverse":
        divergence = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    else:
        divergence = torch.nn.functional.kl_div(log_p, log_q, log_target=True, reduction="none").sum(-1)
    return TokenStatistics(log_p[torch.arange(len(target)), target], entropy, divergence)


def both(
    given: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor],
    options: dict[str, Any],
    direction: Divergence,
    rows: int,
) -> tuple[list[Tensor], list[Tensor]]:
    """Values and gradients of a random combination of the three statistics, fused and naive."""
    hidden, weight, bias, target, other_hidden, other_weight = given
    upstream = draw(3, len(hidden), seed=99, dtype=hidden.dtype)
    wanted = [t for t in (hidden, weight, bias) if t is not None]
    options = {k: v for k, v in options.items() if k != "bias"}
    found = token_statistics(
        hidden,
        target,
        Head(weight, bias, **options),
        entropy=True,
        reference=(other_hidden, Head(other_weight, **options)),
        divergence=direction,
        chunk_elements=rows * len(weight),
    )
    expected = naive(
        naive_logits(hidden, weight, bias, options),
        target,
        naive_logits(other_hidden, other_weight, None, options),
        direction,
    )
    results = []
    for statistics in (found, expected):
        assert statistics.entropy is not None
        assert statistics.divergence is not None
        stacked = torch.stack([statistics.logp, statistics.entropy, statistics.divergence])
        results.append([stacked.detach(), *torch.autograd.grad((upstream * stacked).sum(), wanted)])
    return results[0], results[1]


@pytest.mark.parametrize("rows", [1, 3, TOKENS], ids=["one", "odd", "all"])
@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("name", HEADS)
def test_equals_the_naive_path_in_float64(name: str, direction: Divergence, rows: int) -> None:
    given_ = inputs(bias="bias" in HEADS[name])
    for found, expected in zip(*both(given_, HEADS[name], direction, rows), strict=True):
        assert found.dtype == torch.float64
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("name", HEADS)
def test_equals_the_naive_path_in_fp32(name: str, direction: Divergence) -> None:
    given_ = inputs(bias="bias" in HEADS[name], dtype=torch.float32)
    for found, expected in zip(*both(given_, HEADS[name], direction, rows=3), strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 9),
    width=st.integers(1, 6),
    vocabulary=st.integers(2, 13),
    rows=st.integers(1, 11),
    name=st.sampled_from(sorted(HEADS)),
    direction=st.sampled_from(["forward", "reverse"]),
    seed=st.integers(0, 1000),
)
def test_equals_the_naive_path_for_every_shape(
    tokens: int, width: int, vocabulary: int, rows: int, name: str, direction: Divergence, seed: int
) -> None:
    given_ = inputs(tokens, width, vocabulary, bias="bias" in HEADS[name], seed=seed)
    for found, expected in zip(*both(given_, HEADS[name], direction, rows), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("inner", [1, 2, 3])
@pytest.mark.parametrize("name", HEADS)
def test_a_softmax_over_fewer_rows_than_a_chunk_changes_nothing(
    name: str, inner: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logprob, "SOFTMAX_ELEMENTS", inner * VOCABULARY)
    for rows in (2, 5, TOKENS):
        given_ = inputs(bias="bias" in HEADS[name])
        for found, expected in zip(*both(given_, HEADS[name], "reverse", rows), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_statistics_can_be_differentiated_alone(wanted: tuple[int, ...], direction: Divergence) -> None:
    # what is asked for as a mere metric, and not differentiated, must not change the gradient of the rest
    hidden, weight, bias, target, other_hidden, other_weight = inputs(bias=True)
    assert bias is not None
    reference = (other_hidden, Head(other_weight))
    found = token_statistics(
        hidden, target, Head(weight, bias), entropy=True, reference=reference, divergence=direction, chunk_elements=33
    )
    expected = naive(hidden @ weight.T + bias, target, other_hidden @ other_weight.T, direction)
    gradients = []
    for statistics in (found, expected):
        parts = (statistics.logp, statistics.entropy, statistics.divergence)
        total = sum((i + 1) * part.square().sum() for i in wanted if (part := parts[i]) is not None)
        assert isinstance(total, Tensor)
        gradients.append(torch.autograd.grad(total, (hidden, weight, bias)))
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_gradcheck(direction: Divergence) -> None:
    hidden, weight, bias, target, other_hidden, other_weight = inputs(3, 2, 4, bias=True)
    assert bias is not None

    def of(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        found = token_statistics(
            h,
            target,
            Head(w, b, 1.2, 2.0, 0.8),
            entropy=True,
            reference=(other_hidden, Head(other_weight)),
            divergence=direction,
            chunk_elements=2 * 4,
        )
        assert found.entropy is not None
        assert found.divergence is not None
        return found.logp, found.entropy, found.divergence

    assert torch.autograd.gradcheck(of, (hidden, weight, bias))


def test_second_derivatives_are_refused_rather_than_wrong() -> None:
    hidden, weight, _, target, *_ = inputs()
    logp = token_statistics(hidden, target, Head(weight)).logp
    (gradient,) = torch.autograd.grad((logp**2).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_have_an_fp32_softmax(dtype: torch.dtype) -> None:
    hidden, weight, bias, target, *_ = inputs(vocabulary=300, bias=True, dtype=dtype)
    assert bias is not None
    found = token_statistics(hidden, target, Head(weight, bias), entropy=True)
    # only the product is rounded to the low precision: everything after it is fp32
    logits = (hidden @ weight.T).float() + bias.float()
    assert found.logp.dtype == torch.float32
    torch.testing.assert_close(found.logp, logits.log_softmax(-1).gather(1, target[:, None])[:, 0])
    found.logp.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == dtype
    assert weight.grad is not None
    assert weight.grad.dtype == dtype
    assert bias.grad is not None
    assert bias.grad.dtype == dtype


def test_hand_computed_values() -> None:
    # logits (log 1, log 3): p = (1/4, 3/4)
    hidden = torch.tensor([[1.0], [1.0]])
    weight = torch.zeros(2, 1)
    bias = torch.tensor([1.0, 3.0]).log()
    uniform, both_words = Head(torch.zeros(2, 1)), torch.tensor([0, 1])
    found = token_statistics(
        hidden,
        torch.tensor([0, 1]),
        Head(weight, bias),
        entropy=True,
        reference=(hidden, uniform),
        divergence="reverse",
    )
    torch.testing.assert_close(found.logp, torch.tensor([0.25, 0.75]).log())
    assert found.entropy is not None
    torch.testing.assert_close(found.entropy, torch.full((2,), 0.5623351446))
    assert found.divergence is not None
    torch.testing.assert_close(found.divergence, torch.full((2,), 0.6931471806 - 0.5623351446))
    forward = token_statistics(
        hidden, both_words, Head(weight, bias), reference=(hidden, uniform), divergence="forward"
    ).divergence
    assert forward is not None
    # KL(uniform || p) = -log 2 - (log 1/4 + log 3/4) / 2
    torch.testing.assert_close(forward, torch.full((2,), 0.1438410362))


@pytest.mark.parametrize("direction", ["forward", "reverse"])
def test_divergence_to_itself_is_zero_with_zero_gradient(direction: Divergence) -> None:
    hidden, weight, bias, target, *_ = inputs(bias=True)
    assert bias is not None
    head = Head(weight, bias, softcap=3.0)
    found = token_statistics(
        hidden,
        target,
        head,
        reference=(hidden.detach(), Head(weight.detach(), bias.detach(), softcap=3.0)),
        divergence=direction,
    ).divergence
    assert found is not None
    torch.testing.assert_close(found, torch.zeros(TOKENS, dtype=torch.float64), rtol=0, atol=1e-14)
    for gradient in torch.autograd.grad(found.sum(), (hidden, weight, bias)):
        torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-14)


def test_extreme_logits_stay_finite() -> None:
    hidden = torch.tensor([[1.0]], requires_grad=True)
    weight = torch.tensor([[3e4], [-3e4], [0.0]])
    found = token_statistics(hidden, torch.tensor([1]), Head(weight), entropy=True, reference=(hidden, Head(weight)))
    assert found.logp.item() == -6e4
    assert found.entropy is not None
    assert found.entropy.item() == 0
    assert found.divergence is not None
    assert found.divergence.item() == 0
    (found.logp + found.entropy + found.divergence).sum().backward()
    assert hidden.grad is not None
    assert bool(hidden.grad.isfinite().all())


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden, weight, bias, target, *_ = inputs(bias=True)
    assert bias is not None
    token_statistics(hidden, target, Head(weight.detach(), bias.detach())).logp.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None
    assert bias.grad is None


def test_wrong_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"hidden \[tokens, width\] and target \[tokens\]; got \(7, 5\) and \(3,\)"):
        token_statistics(torch.zeros(7, 5), torch.zeros(3, dtype=torch.int64), Head(torch.zeros(4, 5)))


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that any operation returned, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def largest(tokens: int, *, fused: bool) -> tuple[int, int]:
    """Elements of the largest tensor computed, and of all that is kept for the backward pass."""
    width, vocabulary, rows = 2, 512, 16
    given_ = inputs(tokens, width, vocabulary, dtype=torch.float32)
    hidden, weight, _, target, other_hidden, other_weight = given_
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with Largest() as record, torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        if fused:
            found = token_statistics(
                hidden,
                target,
                Head(weight, softcap=30.0, temperature=0.9),
                entropy=True,
                reference=(other_hidden, Head(other_weight)),
                chunk_elements=rows * vocabulary,
            )
        else:
            found = naive(hidden @ weight.T, target, other_hidden @ other_weight.T, "reverse")
        assert found.entropy is not None
        assert found.divergence is not None
        (found.logp + found.entropy + found.divergence).sum().backward()
    return record.elements, sum(kept.values())


def test_no_tensor_grows_with_vocabulary_times_tokens() -> None:
    chunk, small, large = 16 * 512, 64, 4096
    assert largest(small, fused=True)[0] == largest(large, fused=True)[0] == chunk
    # what it would be if the logits were materialised: the measurement sees them
    assert largest(small, fused=False)[0] == small * 512
    assert largest(large, fused=False)[0] == large * 512


def test_what_is_kept_for_the_backward_pass_is_a_few_numbers_a_token() -> None:
    few = largest(64, fused=True)[1]
    many = largest(4096, fused=True)[1]
    assert (many - few) / (4096 - 64) <= 2 + 4  # the hidden state's width; target, normaliser, entropy, divergence
    assert largest(4096, fused=False)[1] >= 4096 * 512


@pytest.mark.parametrize("native", [True, False])
def test_states_are_rounded_to_the_precision_of_the_head(native: bool) -> None:
    """As a model does that keeps its states in fp32 and projects them with a head in bf16."""
    hidden, weight, _, target, _, _ = inputs(dtype=torch.float32)
    low = weight.detach().bfloat16()
    with contextlib.nullcontext() if native else library.switched_off():
        found = token_statistics(hidden, target, Head(low), entropy=True)
        expected = token_statistics(hidden.detach().bfloat16(), target, Head(low), entropy=True)
        assert found.entropy is not None
        assert expected.entropy is not None
        assert torch.equal(found.logp, expected.logp)
        assert torch.equal(found.entropy, expected.entropy)
        found.logp.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.dtype == torch.float32
    assert torch.equal(Head(low).logits(hidden.detach()), Head(low).logits(hidden.detach().bfloat16()))
