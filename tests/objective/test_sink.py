"""Gradients that go straight into an optimizer's fp32 sums are those of autograd, less its roundings."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from posttrain.objective import sink
from posttrain.objective.logprob import Head, token_statistics
from posttrain.objective.sink import GradientSink, close_sink, open_sink, sink_of, transposed_product

BF16 = torch.bfloat16


def opened(weight: Tensor) -> tuple[nn.Parameter, Tensor]:
    parameter = nn.Parameter(weight.clone())
    master = weight.detach().float().requires_grad_()
    open_sink(parameter, master)
    return parameter, master


def gradient(master: Tensor) -> Tensor:
    assert master.grad is not None
    return master.grad


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (37, 45), (64, 16), (48, 200)])
def test_a_transposed_product_is_the_product(dtype: torch.dtype, rows: int, columns: int) -> None:
    torch.manual_seed(0)
    whole, right = torch.randn(rows, columns + 7).to(dtype), torch.randn(rows, 24).to(dtype)
    left = whole[:, 3 : 3 + columns]
    found, wanted = transposed_product(left, right), left.double().T @ right.double()
    assert found.dtype == dtype
    assert float((found - wanted).abs().max() / wanted.abs().max()) < (1e-6 if dtype == torch.float32 else 5e-3)


def test_products_are_added_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sink, "PART", 8)
    torch.manual_seed(0)
    left, right = torch.randn(6, 21).to(BF16), torch.randn(6, 5).to(BF16)
    made = GradientSink(torch.zeros(21, 5, requires_grad=True))
    product = (left.T @ right).float()
    for times in (1, 2, 3):
        made.add_product(left, right)
        torch.testing.assert_close(gradient(made.master), times * product, rtol=1e-2, atol=1e-2)


def test_rows_of_one_index_are_added() -> None:
    made = GradientSink(torch.zeros(4, 2, requires_grad=True))
    rows = torch.tensor([[256.0, 1], [0.25, 1], [0.25, 1], [3, 3]], dtype=BF16)
    made.add_rows(torch.tensor([1, 1, 1, 3]), rows)
    assert gradient(made.master).tolist() == [[0, 0], [256.5, 3], [0, 0], [3, 3]]
    made.add_rows(torch.tensor([0]), rows[:1])
    assert gradient(made.master)[0].tolist() == [256, 1]


def test_a_sink_is_of_one_tensor_until_it_is_closed() -> None:
    parameter, master = opened(torch.ones(3, 2, dtype=BF16))
    assert sink_of(parameter) is not None
    assert sink_of(parameter.detach()) is None
    later = torch.ones(3, 2, requires_grad=True)
    open_sink(parameter, later)
    close_sink(parameter, master)  # another has taken its place
    found = sink_of(parameter)
    assert found is not None
    assert found.master is later
    close_sink(parameter, later)
    assert sink_of(parameter) is None


@pytest.mark.parametrize("chunk", [1 << 25, 300 * 13])
@pytest.mark.parametrize("entropy", [False, True])
def test_the_fused_operator_adds_to_it(chunk: int, entropy: bool) -> None:
    """Two passes, of one chunk or of several; the sum in fp32 is nearer to the truth than that of autograd in bf16."""
    torch.manual_seed(0)
    passes = [(torch.randn(n, 16).to(BF16), torch.randint(300, (n,)), torch.randn(n)) for n in (50, 21)]
    weight = torch.randn(300, 16).to(BF16)

    def backward(projection: Tensor, dtype: torch.dtype) -> list[Tensor]:
        given: list[Tensor] = []
        for states, target, upstream in passes:
            hidden = states.to(dtype, copy=True).requires_grad_()
            found = token_statistics(hidden, target, Head(projection), entropy=entropy, chunk_elements=chunk)
            loss = found.logp if found.entropy is None else found.logp + found.entropy
            (loss * upstream.to(loss.dtype)).sum().backward()
            assert hidden.grad is not None
            given.append(hidden.grad)
        return given

    parameter, master = opened(weight)
    plain, truth = nn.Parameter(weight.clone()), nn.Parameter(weight.double())
    states, wanted = backward(parameter, BF16), backward(plain, BF16)
    backward(truth, torch.float64)
    assert parameter.grad is None
    assert plain.grad is not None
    assert truth.grad is not None
    assert all(torch.equal(a, b) for a, b in zip(states, wanted, strict=True))
    error = float((gradient(master) - truth.grad).norm() / truth.grad.norm())
    assert error < float((plain.grad.double() - truth.grad).norm() / truth.grad.norm())
    assert error < 1e-2


def test_with_nothing_to_differentiate_nothing_is_added() -> None:
    parameter, master = opened(torch.randn(30, 4).to(BF16))
    parameter.requires_grad_(False)  # frozen, though an optimizer knows it
    hidden = torch.randn(5, 4).to(BF16).requires_grad_()
    token_statistics(hidden, torch.arange(5), Head(parameter)).logp.sum().backward()
    assert hidden.grad is not None
    assert master.grad is None
