"""Completions drawn in a lower precision than the policy is trained in, as fast inference engines do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.models.causal import CausalPolicy
from posttrain.rollout.context import StepContext
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.plain import PlainEngine
from posttrain.trajectory import Group, PosttrainError, Prompt


@dataclass(frozen=True, slots=True)
class LowPrecision:
    """A group for each prompt, drawn by a copy of the present policy whose weight matrices are rounded to `bits` bits.

    The log-probabilities that come with the completions are those of the copy, so the trainer sees a sampler that is
    not quite its own policy: the train-inference discrepancy, here of a size to choose. It is computed in the policy's
    own precision: nothing becomes faster by it.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise PosttrainError(f"bits is {self.bits}; expected 2 to 16")

    def __call__(self, prompts: Sequence[Prompt], context: StepContext) -> list[Group]:
        present = context.engine
        policy = rounded(context.required_policy(), self.bits)
        if isinstance(present, EmbeddedEngine):
            engine: EmbeddedEngine | PlainEngine = EmbeddedEngine(policy, rows=present.rows, experts=present.experts)
        elif isinstance(present, PlainEngine):
            engine = PlainEngine(policy, rows=present.rows)
        else:
            raise PosttrainError(
                f"low precision is imitated in this process, and {type(present).__name__} decodes elsewhere; set the "
                f"precision of that engine"
            )
        groups = context.sample(prompts, engine=engine)
        context.score(groups)
        return groups


@torch.no_grad()
def rounded(policy: CausalPolicy, bits: int) -> CausalPolicy:
    """A frozen copy (adapters merged) with every weight matrix rounded; norms and biases stay."""
    copied = policy.frozen_copy()
    for parameter in copied.model.parameters():
        if parameter.ndim > 1:
            parameter.copy_(round_rows(parameter, bits))
    return copied


def round_rows(weight: Tensor, bits: int) -> Tensor:
    """The nearest of the 2^bits - 1 values of a symmetric grid scaled by each row's largest value: `[..., inputs]`."""
    top = 2 ** (bits - 1) - 1
    scale = weight.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny) / top
    return (weight / scale).round().clamp(-top, top) * scale
