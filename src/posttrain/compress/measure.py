"""What a compression costs and brings: perplexity before and after, divergence, bits, bytes, decoding rate."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from posttrain.compress.policy import CompressedPolicy
from posttrain.evaluation.perplexity import Predictions, predict
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.engine import Progress
from posttrain.rollout.engine_choice import engine_for
from posttrain.trajectory import Group, PosttrainError, Prompt, Sampling

DECODED, PROMPT = 16, 16  # tokens of a timed completion and of its prompt


@dataclass(frozen=True)
class Measurement:
    """A compressed model beside the float one.

    perplexity_before, perplexity: of the same text. kl: from the float model's distribution, mean nats a token.
    bits: stored bits a packed weight, everything counted. bytes_before, bytes_after: of the whole model.
    layers: packed. error: mean relative error of their weights. seconds: of the compression. tokens: measured on.
    """

    method: str
    perplexity_before: float
    perplexity: float
    kl: float
    bits: float
    bytes_before: int
    bytes_after: int
    layers: int
    error: float
    seconds: float
    tokens: int


def measure(
    small: CompressedPolicy, policy: CausalPolicy, unseen: Sequence[Group], progress: Progress | None = None
) -> Measurement:
    """Both models on windows of a text that was not calibrated on."""
    return measurement(small, policy, predict(small, unseen, of=policy, progress=progress))


def measurement(small: CompressedPolicy, policy: CausalPolicy, found: Predictions) -> Measurement:
    """From what the compressed model made of a text, beside the float one."""
    assert found.other is not None
    done = small.compression
    return Measurement(
        method=done.method,
        perplexity_before=found.other.perplexity,
        perplexity=found.perplexity,
        kl=found.divergence,
        bits=done.bits,
        bytes_before=model_bytes(policy.model),
        bytes_after=model_bytes(small.model),
        layers=len(done.layers),
        error=mean_error(small),
        seconds=done.seconds,
        tokens=int(found.tokens.sum()),
    )


def mean_error(small: CompressedPolicy) -> float:
    """The relative Frobenius error of a layer's weights, mean over the packed layers."""
    layers = small.compression.layers
    return sum(layer.error for layer in layers) / max(1, len(layers))


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's tensors in memory as on disk: parameters and persistent buffers, each storage once."""
    found = {(t.data_ptr(), t.shape): t.numel() * t.element_size() for t in model.state_dict().values() if t.numel()}
    return sum(found.values())


def in_megabytes(count: int) -> str:
    """`128.4 MB`."""
    return f"{count / 1e6:,.1f} MB" if count >= 1e5 else f"{count / 1e6:.3f} MB"


def decoding_rate(policy: CausalPolicy, tokens: int = DECODED, seed: int = 0) -> float:
    """Tokens a second of one sequence in this process, after a short prompt (which is timed with it).

    Where a completion ends early another follows, until `tokens` are drawn.
    """
    vocabulary = policy.head().weight.shape[0]
    draw = torch.Generator().manual_seed(seed)
    prompt = Prompt(torch.randint(0, vocabulary, (min(PROMPT, policy.max_length // 2),), generator=draw))
    if policy.max_length < 4:
        raise PosttrainError(f"{policy.name} takes {policy.max_length} tokens; too few to time its decoding")
    engine = engine_for(policy, rows=1)  # which tries a few tokens, so that nothing happens for the first time below
    drawn, begun, number = 0, time.perf_counter(), 0
    while drawn < tokens:
        (made,) = engine.generate([prompt], 1, Sampling(max_tokens=tokens - drawn), seed + number)
        drawn, number = drawn + len(made[0].tokens), number + 1
    return drawn / (time.perf_counter() - begun)
