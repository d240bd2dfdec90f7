"""The fused operator: token log-probabilities (and entropies, divergences to a reference) from hidden states.

Logits are computed a chunk of tokens at a time and never kept: the forward pass stores one normaliser a token, the
backward pass recomputes the chunk and multiplies it with the upstream weights. Peak memory is one chunk, whatever the
vocabulary and the number of tokens. Every method uses it, since a method only differs in the upstream weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from posttrain.native import library, softmax
from posttrain.objective.sink import sink_of

CHUNK_ELEMENTS = 1 << 25  # gradients of logits held at a time: 64 MiB in bf16
SOFTMAX_ELEMENTS = 1 << 22  # of which this many are in the softmax at a time: 16 MiB in fp32
ROWWISE_ELEMENTS = 1 << 24  # or this many where it is a function of a row, which has no need of a cache
# on a GPU all of a chunk at once: its products want many rows, and every launch costs; 256 MiB in fp32
DEVICE_ELEMENTS = 1 << 26
Divergence = Literal["forward", "reverse"]

COLLISION_TOKENS = 128  # hidden states whose logits over the whole vocabulary are held at a time


class Packed(Protocol):
    """A weight `[vocab, width]` in another order: `hidden @ weight.T` of hidden states `[tokens, width]`."""

    def product(self, inputs: Tensor) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Head:
    """A vocabulary projection: `logits = softcap(scale * (hidden @ weight.T + bias))`.

    weight: `[vocab, width]`; bias: `[vocab]` or None; scale: multiplies logits (1 / sampling temperature, model scale);
    softcap: `cap * tanh(logits / cap)` as in Gemma 2, applied before the temperature; None for none. packed: the weight
    once more, in an order in which it is read faster for a while.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0
    packed: Packed | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """`[tokens, width]` to fp32 (float64 stays float64) `[tokens, vocab]`."""
        logits = self._projected(hidden)
        if self.scale != 1:
            logits *= self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        if self.temperature != 1:
            logits /= self.temperature
        return logits

    @property
    def factor(self) -> float | None:
        """What multiplies `hidden @ weight.T` to give the logits; None where there is more to do than to multiply."""
        return None if self.bias is not None or self.softcap is not None else self.scale / self.temperature

    @torch.no_grad()
    def collision(self, hidden: Tensor) -> Tensor:
        """Sum over the vocabulary of the squared probabilities: `[tokens, width]` to `[tokens]` fp32."""
        found = []
        for part in hidden.split(COLLISION_TOKENS):
            logits = self.logits(part)
            found.append((torch.logsumexp(2 * logits, -1) - 2 * torch.logsumexp(logits, -1)).exp())
        return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)

    def pull_back(self, grad: Tensor, hidden: Tensor) -> Tensor:
        """Gradient with respect to `hidden @ weight.T + bias` from that with respect to the logits, in place."""
        if self.temperature != 1:
            grad /= self.temperature
        if self.softcap is not None:
            grad *= 1 - torch.tanh(self._projected(hidden) * (self.scale / self.softcap)) ** 2
        if self.scale != 1:
            grad *= self.scale
        return grad

    def product(self, hidden: Tensor) -> Tensor:
        """`hidden @ weight.T`: `[tokens, width]` to `[tokens, vocab]` in the dtype of the weight."""
        hidden = hidden.to(self.weight.dtype)  # those of Mamba are in fp32 whatever its weights are
        return hidden @ self.weight.T if self.packed is None else self.packed.product(hidden)

    def _projected(self, hidden: Tensor) -> Tensor:
        product = self.product(hidden)
        product = product.to(_wide(product.dtype))
        if self.bias is not None:
            product += self.bias
        return product


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the softmax: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


@dataclass(frozen=True, slots=True)
class TokenStatistics:
    """logp, entropy and divergence of each token, `[tokens]` fp32 (float64 for float64 hidden states); the latter two
    None unless asked for."""

    logp: Tensor
    entropy: Tensor | None = None
    divergence: Tensor | None = None


def token_statistics(
    hidden: Tensor,
    target: Tensor,
    head: Head,
    *,
    entropy: bool = False,
    reference: tuple[Tensor, Head] | None = None,
    divergence: Divergence = "reverse",
    chunk_elements: int | None = None,
) -> TokenStatistics:
    r"""Log-probability of `target` under `softmax(head(hidden))`, differentiable in hidden, weight and bias.

    Args:
        hidden: `[tokens, width]`, any floating dtype; products are taken in that of the head's weight, the softmax in
            fp32 at least.
        target: `[tokens]` int64.
        head: the projection.
        entropy: also return :math:`-\sum_v p_v \log p_v` (differentiable).
        reference: hidden states and head of another model, constant; adds the full-vocabulary divergence to it.
        divergence: ``reverse`` is KL(policy || reference), ``forward`` is KL(reference || policy).
        chunk_elements: logits held at a time, by default as many as suit the device; a chunk is at least one token.
    """
    if hidden.ndim != 2 or target.shape != hidden.shape[:1]:
        raise ValueError(
            f"token_statistics needs hidden [tokens, width] and target [tokens]; "
            f"got {tuple(hidden.shape)} and {tuple(target.shape)}"
        )
    if chunk_elements is None:
        chunk_elements = DEVICE_ELEMENTS if on_gpu(head.weight) else CHUNK_ELEMENTS
    rows = max(1, chunk_elements // head.weight.shape[0])
    hidden = hidden.to(head.weight.dtype)
    logp, ent, div = _Fused.apply(hidden, head.weight, head.bias, target, head, entropy, reference, divergence, rows)
    return TokenStatistics(logp, ent if entropy else None, div if reference is not None else None)


class _Fused(torch.autograd.Function):
    """On a CPU rows are handled in two sizes: the softmax, bound by memory traffic, takes few at a time (`inner`, so
    that they stay in cache); the products with the vocabulary matrix in the backward pass take many (`rows`).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        head: Head,
        entropy: bool,
        reference: tuple[Tensor, Head] | None,
        divergence: Divergence,
        rows: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        lse, logp, ent, div = (hidden.new_zeros(len(hidden), dtype=_wide(hidden.dtype)) for _ in range(4))
        ctx.set_materialize_grads(False)  # what nobody differentiates (entropy as a mere metric) costs nothing
        ctx.settings = (head, reference, divergence, rows)
        factor = head.factor
        ctx.native = factor is not None and library.there_for(hidden, weight)
        inner = _softmax_rows(weight, rows, ROWWISE_ELEMENTS if ctx.native and reference is None else SOFTMAX_ELEMENTS)
        if ctx.native and factor is not None:
            for start in range(0, len(hidden), inner):
                part = slice(start, start + inner)
                product = hidden[part] @ weight.T
                lse[part], spread = softmax.log_sum(product, factor, entropy=entropy)
                if spread is not None:
                    ent[part] = spread
                logp[part] = product.gather(1, target[part, None])[:, 0].float() * factor - lse[part]
                if reference is not None:
                    div[part] = _divergence(
                        product.float().mul_(factor).sub_(lse[part, None]), reference, part, divergence
                    )
            ctx.save_for_backward(hidden, weight, bias, target, lse, ent, div)
            return logp, ent, div
        for start in range(0, len(hidden), inner):
            part = slice(start, start + inner)
            logits = head.logits(hidden[part])
            lse[part] = torch.logsumexp(logits, -1)
            logp[part] = logits.gather(1, target[part, None])[:, 0] - lse[part]
            if reference is not None:
                div[part] = _divergence(logits - lse[part, None], reference, part, divergence)
            if entropy:
                # H = lse - sum p z, with p formed in place of a second copy of the logits
                p = (logits - lse[part, None]).exp_()
                ent[part] = lse[part] - p.mul_(logits).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, target, lse, ent, div)
        return logp, ent, div

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g_logp: Tensor | None, g_ent: Tensor | None, g_div: Tensor | None) -> tuple[Any, ...]:
        hidden, weight, bias, target, lse, *_ = ctx.saved_tensors
        head, _, _, rows = ctx.settings
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight: Tensor | None = None
        sink = sink_of(weight) if wants_weight else None
        d_bias = torch.zeros_like(bias, dtype=_wide(bias.dtype)) if wants_bias and bias is not None else None
        inner = _softmax_rows(weight, rows, SOFTMAX_ELEMENTS)
        buffer = hidden.new_empty(min(rows, len(hidden)), len(weight))
        for start in range(0, len(hidden), rows):
            h = hidden[start : start + rows]
            low = buffer[: len(h)]
            if ctx.native and g_logp is not None and g_ent is None and g_div is None:
                whole = slice(start, start + len(h))
                torch.mm(h, weight.T, out=low)
                softmax.logit_gradient(low, target[whole], lse[whole], g_logp[whole], head.scale / head.temperature)
            else:
                for at in range(0, len(h), inner):
                    part = slice(start + at, min(start + at + inner, start + len(h)))
                    grad = head.pull_back(_logit_gradient(ctx, part, g_logp, g_ent, g_div), hidden[part])
                    if d_bias is not None:
                        d_bias += grad.sum(0)
                    low[at : at + inner] = grad
            if d_hidden is not None:
                d_hidden[start : start + rows] = low @ weight
            if sink is not None:
                sink.add_product(low, h)
            elif wants_weight:
                product = low.T @ h
                d_weight = product.to(_wide(product.dtype)) if d_weight is None else d_weight.add_(product)
        return (
            d_hidden,
            d_weight.to(weight.dtype) if d_weight is not None else None,
            d_bias.to(bias.dtype) if d_bias is not None and bias is not None else None,
            *(None,) * 6,
        )


def _divergence(log_p: Tensor, reference: tuple[Tensor, Head], part: slice, divergence: Divergence) -> Tensor:
    """KL of the policy's log-probabilities of some rows, `[rows, vocab]`, and the reference's: `[rows]`."""
    log_q = reference[1].logits(reference[0][part]).log_softmax(-1)
    first, second = (log_p, log_q) if divergence == "reverse" else (log_q, log_p)
    return (first.exp() * (first - second)).sum(-1)


def on_gpu(weight: Tensor) -> bool:
    """Whether rows are handled as a GPU wants it."""
    return weight.is_cuda


def _softmax_rows(weight: Tensor, rows: int, elements: int) -> int:
    if on_gpu(weight):
        return rows
    return min(rows, max(1, elements // weight.shape[0]))


def _logit_gradient(ctx: Any, part: slice, g_logp: Tensor | None, g_ent: Tensor | None, g_div: Tensor | None) -> Tensor:
    """Gradient with respect to the logits of some rows: `[rows, vocab]`, at least fp32."""
    hidden, _, _, target, lse, ent, div = ctx.saved_tensors
    head, reference, divergence, _ = ctx.settings
    log_p = head.logits(hidden[part]).sub_(lse[part, None])
    if g_ent is None and g_div is None:
        grad = log_p.exp_()
    else:
        grad = log_p.exp()
        p = grad.clone()
    if g_logp is None:
        grad.zero_()
    else:
        grad.mul_(-g_logp[part, None])
        grad.scatter_add_(1, target[part, None], g_logp[part, None].to(grad.dtype))
    if g_ent is not None:
        grad -= g_ent[part, None] * p * (log_p + ent[part, None])
    if g_div is not None:
        log_q = reference[1].logits(reference[0][part]).log_softmax(-1)
        if divergence == "reverse":
            grad += g_div[part, None] * p * (log_p - log_q - div[part, None])
        else:
            grad += g_div[part, None] * (p - log_q.exp())
    return grad
