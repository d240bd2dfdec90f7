"""Expert routing of mixture-of-experts models: recording which experts a token was sent to, and replaying them later.

A router of `transformers` returns `(logits [N, experts], weights [N, k], index [N, k])`, which its layer then follows.
Hooks on the routers read that, or put another set of experts in the place of the router's own; the weights of the
forced set are still computed from the router's present logits, with their gradient, and normalised as the model does.
What a router computes is compared with what is known here before anything is recorded: softmax over all experts,
normalised over the chosen ones or not (Mixtral, Qwen MoE, OLMoE, GPT-OSS, ...). Any other is refused.
Reference: Stabilizing reinforcement learning with LLMs, 2025, arXiv 2512.01374 (card 181).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.trajectory import PosttrainError

OWN = -1  # in the place of an expert: the router decides for this token itself


def routers(model: nn.Module) -> list[nn.Module]:
    """The routers of a model, in the order of its layers; empty for a dense one."""
    return [m for m in model.modules() if "Router" in type(m).__name__ and hasattr(m, "top_k")]


class Recorder:
    """The experts that the routers chose since the last `take`."""

    def __init__(self, count: int) -> None:
        self.chosen: list[Tensor | None] = [None] * count

    def take(self) -> Tensor:
        """Experts of the last forward pass: `[N, layers, k]` int16, N as the routers saw it (rows times places)."""
        found = [c for c in self.chosen if c is not None]
        if len(found) < len(self.chosen):
            raise RuntimeError("a router was not called in the forward pass that was recorded")
        self.chosen = [None] * len(found)
        return torch.stack(found, 1).to(torch.int16).cpu()


@contextmanager
def record_experts(model: nn.Module) -> Iterator[Recorder]:
    """Record the experts of every forward pass inside the block, those of `replay_experts` included.

    Raises PosttrainError for a model without routers, or with one that is not known here.
    """
    found = _known_routers(model)
    recorder = Recorder(len(found))

    def hook(layer: int, router: nn.Module, output: Any) -> None:
        logits, weights, index = output
        expected = _weights(router, logits.detach(), index).to(weights)
        if not torch.allclose(expected, weights.detach(), rtol=1e-2, atol=1e-3):
            raise PosttrainError(
                f"{type(router).__name__} weighs its experts in a way that is not known here; expected a softmax over "
                f"all of them; train without routing replay"
            )
        recorder.chosen[layer] = index.detach()

    with ExitStack() as hooks:
        for layer, router in enumerate(found):
            handle = router.register_forward_hook(lambda m, _, out, layer=layer: hook(layer, m, out))
            hooks.callback(handle.remove)
        yield recorder


@contextmanager
def replay_experts(model: nn.Module, experts: Tensor) -> Iterator[None]:
    """Send every token to the given experts inside the block: `[N, layers, k]` integers, `OWN` for the router's choice.

    N counts the tokens as the routers see them. The set is forced, its weights follow from the present logits.
    """
    found = _known_routers(model)
    if any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        raise PosttrainError(
            "routing replay and gradient checkpointing exclude each other: layers computed again in the backward pass "
            "would choose their experts anew; switch one of them off"
        )
    if experts.ndim != 3 or experts.shape[1] != len(found):
        raise PosttrainError(
            f"the experts to replay have shape {tuple(experts.shape)}; expected [tokens, {len(found)} layers, k]; "
            f"they were recorded on another model"
        )

    def hook(layer: int, router: nn.Module, output: Any) -> Any:
        logits, weights, index = output
        forced = experts[:, layer].to(index)
        if forced.shape != index.shape:
            raise PosttrainError(
                f"the experts to replay are {tuple(forced.shape)} in layer {layer}, and its router chose "
                f"{tuple(index.shape)}; they were recorded on another model or other tokens"
            )
        forced = torch.where(forced == OWN, index, forced)
        return logits, _weights(router, logits, forced).to(weights.dtype), forced

    with ExitStack() as hooks:
        for layer, router in enumerate(found):
            handle = router.register_forward_hook(lambda m, _, out, layer=layer: hook(layer, m, out))
            hooks.callback(handle.remove)
        yield


@contextmanager
def routed(
    model: nn.Module,
    experts: Sequence[Tensor] | None,
    places: Callable[[], Sequence[Tensor]],
    count: int,
    chosen: list[Tensor] | None = None,
) -> Iterator[None]:
    """One forward pass over the sequences of a batch: with their `experts` replayed, where there are any (see
    `scattered` for `experts`, `places` and `count`), and with those that each was sent to added to `chosen`, if given.
    """
    replays = experts is not None and any(len(e) for e in experts)
    index = places() if replays or chosen is not None else ()
    with ExitStack() as stack:
        if replays and experts is not None:
            stack.enter_context(replay_experts(model, scattered(experts, index, count)))
        recorder = stack.enter_context(record_experts(model)) if chosen is not None else None
        yield
        if recorder is not None and chosen is not None:
            taken = recorder.take()
            chosen += [taken[i] for i in index]


def scattered(experts: Sequence[Tensor], places: Sequence[Tensor], count: int) -> Tensor:
    """Experts of sequences, `[length, layers, k]` each, at their places among `count` tokens; `OWN` elsewhere.

    places: for each sequence the packed index of each of its inputs. A sequence whose experts are unknown has an empty
    tensor; one with fewer experts than inputs leaves the rest to the routers. Where sequences share tokens (a prompt),
    the first one's experts count.
    """
    known = next((e for e in experts if len(e)), None)
    if known is None:
        raise ValueError("no sequence has experts to replay")
    out = torch.full((count, *known.shape[1:]), OWN, dtype=known.dtype)
    for own, index in reversed(list(zip(experts, places, strict=True))):
        size = min(len(own), len(index))
        if size:
            out[index[:size]] = own[:size]
    return out


def _known_routers(model: nn.Module) -> list[nn.Module]:
    found = routers(model)
    if not found:
        raise PosttrainError(
            f"{type(model).__name__} has no router: routing replay is for mixture-of-experts models; train without it"
        )
    return found


def _weights(router: nn.Module, logits: Tensor, index: Tensor) -> Tensor:
    """Weights of chosen experts from the router's logits: `[N, experts]` and `[N, k]` to `[N, k]` fp32."""
    chosen = torch.softmax(logits.float(), -1).gather(-1, index)
    return chosen / chosen.sum(-1, keepdim=True) if getattr(router, "norm_topk_prob", True) else chosen
