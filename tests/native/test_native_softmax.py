"""Softmax over keys and over the vocabulary in C, beside PyTorch's."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from posttrain.native import library, softmax
from posttrain.objective.logprob import Head, token_statistics
from posttrain.rollout.sampling import draw, draw_next
from posttrain.trajectory import PosttrainError, Sampling

pytestmark = pytest.mark.skipif(library.library() is None, reason="posttrain was built without its C functions")
DTYPES = (torch.float32, torch.bfloat16)


def close(found: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype) -> bool:
    limit = 3e-6 if dtype == torch.float32 else 1e-2
    return bool((found.float() - wanted.float()).abs().max() <= limit * wanted.float().abs().max())


def near(found: torch.Tensor, wanted: torch.Tensor, size: torch.Tensor, dtype: torch.dtype) -> bool:
    limit = 3e-6 if dtype == torch.float32 else 1e-2
    return bool((found.float() - wanted).abs().max() <= limit * size.float().abs().max())


def masks(queries: int, keys: int) -> dict[str, torch.Tensor]:
    """`[2, 1, queries, keys]`: any keys, a prefix of them, a window that ends before the last."""
    gap = torch.arange(queries)[:, None] * keys // queries - torch.arange(keys)
    found = {"any": torch.rand(2, 1, queries, keys) < 0.7, "prefix": gap >= 0, "window": (gap >= 0) & (gap < 9)}
    found["any"][..., 0] = True
    return {name: mask.expand(2, 1, queries, keys).contiguous() for name, mask in found.items()}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [1, 5, 40, 131])
@pytest.mark.parametrize("kind", ["any", "prefix", "window"])
def test_attention_weights_and_their_gradient(dtype: torch.dtype, keys: int, kind: str) -> None:
    torch.manual_seed(0)
    scores = (4 * torch.randn(2, 3, 7, keys)).to(dtype)
    value, given = (torch.randn(2, 3, n, 6).to(dtype) for n in (keys, 7))
    back, seen = given @ value.transpose(-1, -2), masks(7, keys)[kind]
    wide = scores.float().requires_grad_()
    weights = (0.25 * wide).masked_fill(~seen, float("-inf")).softmax(-1)
    weights.backward(back.float())
    out = (weights.detach() @ value.float()).to(dtype)
    assert wide.grad is not None

    assert close(softmax.attention_weights(scores.clone(), seen, 0.25), weights, dtype)
    again, low = scores.clone(), back.clone()
    softmax.attention_gradients(again, seen, low, out, given, 0.25)
    assert close(again, weights, dtype)
    assert near(low, wide.grad, 0.25 * back, dtype)
    hidden = ~seen.expand_as(scores)
    assert not again[hidden].any()
    assert not low[hidden].any()


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 700), st.floats(0.1, 30), st.integers(0, 10**6))
def test_log_sum_and_entropy_are_those_of_torch(vocab: int, spread: float, seed: int) -> None:
    logits = spread * torch.randn(3, vocab, generator=torch.Generator().manual_seed(seed))
    if vocab > 1:
        logits[0, 0] = float("-inf")
    lse, entropy = softmax.log_sum(logits, 0.5, entropy=True)
    assert entropy is not None
    assert torch.allclose(lse, torch.logsumexp(0.5 * logits, -1), rtol=1e-6, atol=1e-5)
    assert torch.allclose(
        entropy, torch.distributions.Categorical(logits=0.5 * logits.double()).entropy().float(), atol=1e-4
    )
    assert torch.equal(lse, softmax.log_sum(logits, 0.5)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_statistics_are_those_of_the_plain_path(dtype: torch.dtype, temperature: float) -> None:
    torch.manual_seed(0)
    states, weight = torch.randn(50, 16).to(dtype), torch.randn(300, 16).to(dtype)
    target, upstream = torch.randint(300, (50,)), torch.randn(50)

    def run() -> tuple[torch.Tensor, ...]:
        inputs = [t.clone().requires_grad_() for t in (states, weight)]
        head = Head(inputs[1], temperature=temperature)
        logp = token_statistics(inputs[0], target, head, chunk_elements=3000).logp
        (logp * upstream).sum().backward()
        assert inputs[0].grad is not None
        assert inputs[1].grad is not None
        return logp.detach(), inputs[0].grad, inputs[1].grad

    found = run()
    with library.switched_off():
        wanted = run()
    assert all(close(a, b, dtype) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_a_draw_is_that_of_the_plain_path(dtype: torch.dtype, temperature: float) -> None:
    torch.manual_seed(0)
    hidden, weight = torch.randn(2000, 8).to(dtype), torch.randn(1000, 8).to(dtype)
    uniform, sampling = torch.rand(2000, dtype=torch.float64), Sampling(temperature=temperature)
    found = draw_next(Head(weight), hidden, uniform, sampling)
    wanted = draw(Head(weight).logits(hidden), uniform, sampling)
    same = found.token == wanted.token
    assert float(same.float().mean()) > 0.995  # a number within rounding of a boundary may fall on either side
    assert torch.allclose(found.logp[same], wanted.logp[same], atol=1e-5)


def test_draws_have_the_frequencies_of_the_softmax() -> None:
    logits = torch.tensor([[0.0, 1.0, float("-inf"), 2.0]]).expand(40_000, 4).contiguous()
    uniform = (torch.arange(40_000, dtype=torch.float64) + 0.5) / 40_000
    token, logp = softmax.draw(logits, uniform, 1.0)
    counts = torch.bincount(token, minlength=4) / 40_000
    assert torch.allclose(counts, logits[0].softmax(-1), atol=1e-4)
    assert torch.allclose(logp, logits[0].log_softmax(-1)[token], atol=1e-6)


@pytest.mark.parametrize("edge", [0.0, 1 - 1e-16])
def test_no_draw_at_an_edge_takes_a_forbidden_token(edge: float) -> None:
    logits = torch.full((1, 600), float("-inf"))
    logits[0, 300] = 0.0
    token, logp = softmax.draw(logits, torch.tensor([edge], dtype=torch.float64), 1.0)
    assert token.tolist() == [300]
    assert logp.tolist() == [0.0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_an_error(bad: float) -> None:
    weight = torch.ones(5, 2)
    weight[3] = bad
    with pytest.raises(PosttrainError, match="not finite"):
        draw_next(Head(weight), torch.ones(1, 2), torch.zeros(1, dtype=torch.float64), Sampling())
