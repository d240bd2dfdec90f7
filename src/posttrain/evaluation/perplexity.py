r"""How well a model predicts a text: its perplexity, and how far its predictions are from those of another model.

A text is one stream of tokens, with the start token in front where the tokenizer writes one, cut into windows of equal
length that do not overlap; what is left over at the end is dropped. In each window every token but the first is
predicted from those before it. The perplexity is the exponential of the mean loss of all predicted tokens (card 000).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from posttrain.models.causal import CausalPolicy, evaluating
from posttrain.objective.batch import Batch
from posttrain.objective.likelihood import Likelihood
from posttrain.rollout.engine import Progress
from posttrain.trajectory import Group, PosttrainError, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS = 4096  # predicted at a time


@dataclass(frozen=True, eq=False, slots=True)
class Predictions:
    """What a model made of some windows.

    loss: `[windows]` mean nats a predicted token; tokens: `[windows]` how many were predicted.
    Where another model was given: kl: `[windows]` mean nats a token from its distribution to this one's; other: its own
    losses on the same tokens, `Predictions` without more.
    """

    loss: NDArray[np.float64]
    tokens: NDArray[np.int64]
    kl: NDArray[np.float64] | None = None
    other: Predictions | None = None

    @property
    def perplexity(self) -> float:
        """Of all windows; inf where it is beyond what a float holds."""
        with np.errstate(over="ignore"):
            return float(np.exp(np.average(self.loss, weights=self.tokens)))

    @property
    def divergence(self) -> float:
        """Mean KL a token over all windows, in nats."""
        if self.kl is None:
            raise ValueError("no other model was given")
        return float(np.average(self.kl, weights=self.tokens))


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """`[tokens]` int64: the text with the start token in front where the tokenizer writes one, and no end token."""
    found = list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
    start = tokenizer.bos_token_id
    begins = start is not None and tokenizer.encode("", add_special_tokens=True)[:1] == [start]
    return torch.tensor([start, *found] if begins else found, dtype=torch.int64)


def windows(tokens: Tensor, length: int, most: int | None = None) -> list[Group]:
    """The first `most` windows of `length` tokens of a stream, each to be predicted but for its first token.

    A stream that is shorter than a window is a window by itself. PosttrainError where nothing is left to predict.
    """
    if length < 2:
        raise PosttrainError(f"windows of {length} tokens hold nothing to predict; expected at least 2")
    parts = list(tokens.split(length))
    if len(parts) > 1 and len(parts[-1]) < length:
        parts.pop()
    if not parts or len(parts[0]) < 2:
        raise PosttrainError(f"the text has {len(tokens)} tokens; expected at least 2 to predict anything")
    mask = torch.ones(length, dtype=torch.bool)
    return [Group([Trajectory(part, mask[: len(part)])]) for part in parts[:most]]


def predict(
    policy: CausalPolicy,
    groups: Sequence[Group],
    *,
    of: CausalPolicy | None = None,
    progress: Progress | None = None,
) -> Predictions:
    """How well a policy predicts the action tokens of windows (of any sequences, one window each).

    of: another policy with the same vocabulary, of which this one is an approximation; adds KL(of || policy) over the
    whole vocabulary, a mean over the same tokens. Logits are made a few tokens at a time.
    """
    if of is not None and of.head().weight.shape[0] != policy.head().weight.shape[0]:
        raise PosttrainError(
            f"{policy.name} and {of.name} have vocabularies of {policy.head().weight.shape[0]} and "
            f"{of.head().weight.shape[0]} tokens; a divergence needs the same one"
        )
    losses: list[Tensor] = []
    others: list[Tensor] = []
    kls: list[Tensor] = []
    counts: list[Tensor] = []
    done, total = 0, sum(len(group) for group in groups)
    for part in batches(groups):
        batch = Batch.of(part)
        found = _likelihood(policy, batch)
        losses.append(-batch.mean(found.logp.double()).cpu())
        counts.append(batch.lengths)
        if of is not None:
            other = _likelihood(of, batch, found)
            assert other.divergence is not None
            kls.append(batch.mean(other.divergence.double()).cpu())
            others.append(-batch.mean(other.logp.double()).cpu())
        done += len(batch)
        if progress is not None:
            progress(done, total)
    tokens = torch.cat(counts).numpy()
    if of is None:
        return Predictions(torch.cat(losses).numpy(), tokens)
    other_found = Predictions(torch.cat(others).numpy(), tokens)
    return Predictions(torch.cat(losses).numpy(), tokens, torch.cat(kls).numpy(), other_found)


def perplexity(policy: CausalPolicy, text: str, *, length: int | None = None, most: int | None = None) -> float:
    """The perplexity of a text, in windows of `length` tokens (2,048, or as many as the model takes, where None)."""
    tokens = encode(policy.tokenizer, text)
    return predict(policy, windows(tokens, length or min(2048, policy.max_length), most)).perplexity


def batches(groups: Sequence[Group]) -> Iterator[list[Group]]:
    """Windows together as long as they hold at most `TOKENS` tokens."""
    if not groups:
        raise PosttrainError("no window to predict; expected text")
    part: list[Group] = []
    size = 0
    for group in groups:
        length = sum(t.length for t in group.trajectories)
        if part and size + length > TOKENS:
            yield part
            part, size = [], 0
        part.append(group)
        size += length
    yield part


@torch.no_grad()
def _likelihood(policy: CausalPolicy, batch: Batch, reference: Likelihood | None = None) -> Likelihood:
    with evaluating(policy.model):
        return policy.log_likelihood(batch, reference=reference, divergence="reverse")
