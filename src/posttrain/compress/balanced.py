"""Calibration text that a mixture of experts writes itself, so that all of its experts are used alike (EBSS)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.compress.calls import Batch
from posttrain.compress.experts import Experts, unfuse
from posttrain.compress.method import Calibrated
from posttrain.trajectory import PosttrainError

TOP = 64  # next tokens that a beam is continued with


@dataclass(frozen=True)
class SelfBalanced(Calibrated):
    r"""As many sequences, as long, as the text that was given, written by the float model with a beam search whose
    score trades likelihood against how unevenly experts are used:

        minimise  -(log P(y) + log P(v | y))/(j + 1) + σ(y)/τ

    for the continuation of a prefix y of j tokens by v. σ is the standard deviation over the E experts of the share of
    the prefix's routed tokens that go to each, times √E as in the authors' pseudo-code, averaged over the layers; it is
    0 if and only if all are used alike.
    First tokens are drawn evenly from the vocabulary; tokens that begin, end or pad a text are never written, since
    what would follow them means nothing to the model. A model without experts is calibrated on the given text.

    temperature: τ; large is a likelihood beam, small is balance alone. beams: prefixes that a sequence keeps.
    rows: sequences that are written together.

    Reference: MoEQuant, 2025, arXiv 2505.03804 (card 149).
    """

    temperature: float = 1.2
    beams: int = 4
    rows: int = 32

    def __post_init__(self) -> None:
        if self.temperature <= 0 or self.beams < 1:
            raise PosttrainError(
                f"temperature is {self.temperature}, beams {self.beams}; expected a positive number, and 1 beam or more"
            )

    def chosen(self, model: nn.Module, given: Sequence[Batch], seed: int) -> Sequence[Batch]:
        unfuse(model)
        if not any(isinstance(m, Experts) for m in model.modules()):
            return given
        if not all("input_ids" in batch for batch in given):
            raise PosttrainError("a mixture writes its own text in the place of text; expected batches with input_ids")
        count, length = sum(len(b["input_ids"]) for b in given), max(b["input_ids"].shape[1] for b in given)
        draw = torch.Generator().manual_seed(seed)
        device = given[0]["input_ids"].device
        written = []
        for start in range(0, count, self.rows):
            rows = min(self.rows, count - start)
            written.append(self.write(model, rows, length, draw).to(device))
        return [{"input_ids": ids, "use_cache": False} for ids in written]

    @torch.no_grad()
    def write(self, model: Any, rows: int, length: int, draw: torch.Generator) -> Tensor:
        """`[rows, length]` int64 tokens."""
        written = writable(model)
        ids = written[torch.randint(0, len(written), (rows, 1), generator=draw)].to(model.device)
        barred = torch.ones(int(model.config.get_text_config().vocab_size), dtype=torch.bool, device=model.device)
        barred[written.to(model.device)] = False
        counts: Tensor | None = None
        likelihood = torch.zeros(rows, 1, device=model.device)  # of each beam
        with usage(model) as take:
            cache = None
            for _ in range(length - 1):
                out = model(input_ids=ids[:, -1:] if cache is not None else ids, past_key_values=cache, use_cache=True)
                cache, beams = out.past_key_values, likelihood.shape[1]
                used = take(rows * beams)
                counts = used if counts is None else counts + used
                uneven = self.spread(counts).view(rows, beams)
                logits = out.logits[:, -1].float().masked_fill(barred, -torch.inf)
                parent, token, likelihood = self._continued(logits, likelihood, uneven, ids.shape[1])
                place = (torch.arange(rows, device=ids.device)[:, None] * beams + parent).flatten()
                ids = torch.cat([ids[place], token.reshape(-1, 1)], 1)
                counts = counts[place]
                cache.reorder_cache(place)
        cost = self._cost(likelihood, self.spread(counts).view(rows, -1), length) if counts is not None else likelihood
        best = cost.argmin(1)
        return ids.view(rows, -1, ids.shape[1])[torch.arange(rows, device=ids.device), best]

    @staticmethod
    def spread(counts: Tensor) -> Tensor:
        """σ of `[rows, layers, experts]` counts, `[rows]`."""
        return imbalance(counts) * counts.shape[-1] ** 0.5

    def _continued(
        self, logits: Tensor, likelihood: Tensor, uneven: Tensor, length: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best continuations: `[rows, beams]` each their prefix, their token and their log-likelihood."""
        rows, beams = likelihood.shape
        chance, token = torch.log_softmax(logits, -1).topk(min(TOP, logits.shape[-1]), -1)
        both = likelihood[:, :, None] + chance.view(rows, beams, -1)
        cost = self._cost(both, uneven[:, :, None], length + 1).flatten(1)
        best = cost.topk(min(self.beams, cost.shape[1]), 1, largest=False).indices
        parent = best // both.shape[2]
        return parent, token.reshape(rows, -1).gather(1, best), both.flatten(1).gather(1, best)

    def _cost(self, likelihood: Tensor, uneven: Tensor, length: int) -> Tensor:
        return -likelihood / length + uneven / self.temperature


def writable(model: Any) -> Tensor:
    """The tokens of a model's vocabulary that do not begin, end or pad a text, ascending."""
    config, special = model.config.get_text_config(), set()
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        found = getattr(config, name, None)
        special |= set(found) if isinstance(found, list | tuple) else {found}
    return torch.tensor([token for token in range(int(config.vocab_size)) if token not in special])


def imbalance(counts: Tensor) -> Tensor:
    """`[rows, layers, experts]` how many tokens each expert was sent -> `[rows]`: the standard deviation of the shares,
    over experts, averaged over layers.
    """
    shares = counts / counts.sum(-1, keepdim=True).clamp(min=1)
    return shares.std(-1, correction=1).mean(-1)


@contextmanager
def usage(model: nn.Module) -> Iterator[Callable[[int], Tensor]]:
    """Inside, the function that is given takes how often each expert was chosen since it was last called, `[rows,
    layers, experts]`, for a model that was run on that many rows.
    """
    layers = [m for m in model.modules() if isinstance(m, Experts)]
    chosen: list[list[Tensor]] = [[] for _ in layers]

    def watch(number: int) -> Callable[..., None]:
        def seen(module: nn.Module, given: tuple[Tensor, ...]) -> None:
            if len(given) < 2:
                raise PosttrainError(
                    "this model weighs tokens before they reach its experts (as Llama 4 does), so how its experts are "
                    "used is not known; calibrate on text: balanced=False"
                )
            chosen[number].append(given[1].detach())

        return seen

    def take(rows: int) -> Tensor:
        found = []
        for layer, indices in zip(layers, chosen, strict=True):
            index = torch.cat([i.reshape(rows, -1) for i in indices], 1)
            found.append(torch.nn.functional.one_hot(index, layer.count).sum(1))
            indices.clear()
        return torch.stack(found, 1).float()

    with ExitStack() as hooks:
        for number, layer in enumerate(layers):
            hooks.callback(layer.register_forward_pre_hook(watch(number)).remove)
        yield take


def balance(model: nn.Module, batches: Sequence[Batch]) -> float:
    """The imbalance of a model's experts over whole batches of text: 0 where all are used alike."""
    with usage(model) as take, torch.no_grad():
        counts = []
        for batch in batches:
            model(**batch)
            counts.append(take(1))
    return float(imbalance(torch.stack(counts).sum(0)))
