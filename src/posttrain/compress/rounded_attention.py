"""Attention whose operands are rounded: queries and keys, and behind the softmax probabilities and values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.compress.activations.percentile import Percentile
from posttrain.compress.activations.probabilities import Tangent
from posttrain.compress.activations.quantizer import Activations
from posttrain.compress.attention_part import AttentionPart
from posttrain.compress.calls import Batch
from posttrain.compress.moments import InputMoments
from posttrain.compress.packed.inputs import from_written, written
from posttrain.compress.solvers.attention_maps import probabilities
from posttrain.models.attention import attention_configs, implementation
from posttrain.trajectory import PosttrainError

NAME, WATCHING = "posttrain-rounded", "posttrain-operands"
OPERANDS = ("query", "key", "probabilities", "value")


@dataclass(frozen=True)
class RoundedAttention(AttentionPart):
    """Static steps for what is multiplied in attention, fitted to what each layer meets in calibration.

    inputs: of queries, keys and values; None leaves them as they are. probabilities: of what the softmax gives; None
    likewise. Rows of rounded probabilities no longer sum to 1; nothing is done about it, as a kernel would not.
    """

    inputs: Activations | None = field(default_factory=Percentile)
    probabilities: Activations | None = field(default_factory=Tangent)

    def __post_init__(self) -> None:
        if self.inputs is None and self.probabilities is None:
            raise PosttrainError("nothing of attention is rounded; expected inputs, probabilities, or no such part")

    @property
    def uses_data(self) -> bool:
        return any(part is not None and part.uses_data for part in self._parts.values())

    @property
    def _parts(self) -> dict[str, Activations | None]:
        return {name: self.probabilities if name == "probabilities" else self.inputs for name in OPERANDS}

    def apply_to_model(self, model: nn.Module, batches: Sequence[Batch], seed: int = 0) -> None:
        keep = {name: part.keep for name, part in self._parts.items() if part is not None}
        names = {id(module): name for name, module in model.named_modules()}
        for module, met in operands(model, batches, keep, seed):
            rounding = AttentionRounding()
            for name, part in self._parts.items():
                if part is not None:
                    step = part.fit(met[name], met[name].width, f"the {name} of {names[id(module)]}")
                    rounding.steps[name] = nn.Sequential(step)
            module.attention_rounding = rounding
        heed(model)


class AttentionRounding(nn.Module):
    """The steps of one attention module, by the operand that they round."""

    def __init__(self) -> None:
        super().__init__()
        self.steps = nn.ModuleDict()

    def forward(self, name: str, operand: Tensor) -> Tensor:
        found: Tensor = self.steps[name](operand) if name in self.steps else operand
        return found

    def settings(self) -> dict[str, Any]:
        """JSON values: the steps by operand; `of_settings` is its inverse."""
        return {name: written(steps) for name, steps in self.steps.items() if isinstance(steps, nn.Sequential)}

    @classmethod
    def of_settings(cls, settings: dict[str, Any]) -> AttentionRounding:
        """Empty steps that wait for `load_state_dict`."""
        made = cls()
        for name, described in settings.items():
            steps = from_written(described)
            assert steps is not None
            made.steps[name] = steps
        return made


@torch.no_grad()
def operands(
    model: nn.Module, batches: Sequence[Batch], keep: dict[str, int], seed: int = 0
) -> list[tuple[nn.Module, dict[str, InputMoments]]]:
    """Every attention module in the order in which they run, with statistics of its operands by name.

    keep: of which operands, and how many vectors (of probabilities, which are of width 1, how many). What a token may
    not see counts as the 0 that it is, so that it stays 0.
    """
    found: dict[int, tuple[nn.Module, dict[str, InputMoments]]] = {}

    def watch(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, Tensor]:
        weights = _weights(module, query, key, attention_mask, options)
        seen = {"query": query, "key": key, "value": value, "probabilities": weights[..., None]}
        if id(module) not in found:
            made = {n: InputMoments(seen[n].shape[-1], gram=False, keep=k, seed=seed) for n, k in keep.items()}
            found[id(module)] = (module, made)
        for name, moments in found[id(module)][1].items():
            moments.add(seen[name])
        return _mixed(weights, value), weights

    _register(WATCHING, watch)
    with implementation(attention_configs(model), WATCHING):
        for batch in batches:
            model(**batch)
    if not found:
        raise PosttrainError(
            f"{type(model).__name__} attends in a way of its own, or not at all; expected a model that uses the "
            f"attention interface of transformers"
        )
    return list(found.values())


def heed(model: nn.Module) -> None:
    """Let a model's attention modules round as their `attention_rounding` says."""
    _register(NAME, rounded_forward)
    for config in attention_configs(model):
        config._attn_implementation = NAME


def rounded_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """query `[rows, heads, Q, width]`, key and value `[rows, key heads, K, width]` to `[rows, Q, heads, width]` and the
    probabilities. A cache holds keys and values as they were; they are rounded each time.
    """
    rounding = getattr(module, "attention_rounding", None)
    if rounding is None:
        weights = _weights(module, query, key, attention_mask, options)
        return _mixed(weights, value), weights
    query, key, value = rounding("query", query), rounding("key", key), rounding("value", value)
    weights = rounding("probabilities", _weights(module, query, key, attention_mask, options))
    return _mixed(weights, value), weights


def _weights(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]) -> Tensor:
    try:
        return probabilities(module, query, key, mask, **options)
    except NotImplementedError as error:
        raise PosttrainError(f"attention cannot be rounded: {error}; choose a method that leaves it as it is") from None


def _mixed(weights: Tensor, value: Tensor) -> Tensor:
    heads = weights.shape[1] // value.shape[1]
    return (weights.to(value.dtype) @ value.repeat_interleave(heads, 1)).transpose(1, 2).contiguous()


def _register(name: str, function: Any) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)
