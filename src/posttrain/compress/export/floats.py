"""The float parts of an exported model (embeddings, norms, layers that were left alone), and how they are stored."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.compress.files import tensors
from posttrain.compress.packed.inputs import InputStep
from posttrain.compress.packed.linear import PackedLinear, TransformedLinear
from posttrain.compress.policy import CompressedPolicy
from posttrain.models.causal import CausalPolicy
from posttrain.trajectory import PosttrainError

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
LARGEST = torch.finfo(torch.float16).max


def packed_layers(policy: CausalPolicy) -> dict[str, PackedLinear]:
    """The packed layers by name, in the model's order."""
    model: Any = policy.base
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def float_tensors(policy: CausalPolicy) -> dict[str, Tensor]:
    """Everything else that the model holds, each tied parameter once; the biases of packed layers too."""
    model: Any = policy.base
    packed = {f"{n}.{b}" for n, m in packed_layers(policy).items() for b, _ in m.named_buffers() if b != "bias"}
    return {name: tensor.detach().cpu() for name, tensor in tensors(model).items() if name not in packed}


def exact_dtype(values: Iterable[Tensor]) -> torch.dtype:
    """The shortest float type that holds all of these values exactly, bf16 before fp16."""
    kept = [tensor.float() for tensor in values]
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(tensor.to(dtype).float(), tensor) for tensor in kept):
            return dtype
    return torch.float32


def rounded(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor in another precision; PosttrainError where its values are beyond it, or are no numbers."""
    check_finite(name, tensor)
    if dtype == torch.float16 and tensor.numel() and float(tensor.abs().amax()) > LARGEST:
        raise PosttrainError(f"{name} holds values beyond half precision (65504); expected --dtype bf16 or f32")
    found = tensor.to(dtype)
    if not torch.isfinite(found).all():  # the largest of fp32 are beyond bf16
        raise PosttrainError(f"{name} holds values beyond the range of {dtype}; expected --dtype f32")
    return found


def check_finite(name: str, tensor: Tensor) -> None:
    if not torch.isfinite(tensor).all():
        raise PosttrainError(f"{name} holds values that are not finite; repair or train the model again")


# -- what no other program's format holds ------------------------------------------------------------------------------


def method_of(policy: CausalPolicy) -> str:
    """What a policy was compressed by, for messages."""
    return policy.compression.method if isinstance(policy, CompressedPolicy) else "no method"


def check_exportable(policy: CausalPolicy, program: str) -> None:
    """PosttrainError for modules that are there in posttrain alone, but for packed layers: attention to chosen tokens,
    experts that were taken apart, steps before float layers.
    """
    model: Any = policy.base
    for name, module in _modules(model):
        if isinstance(module, TransformedLinear):
            for step in input_steps(module):
                raise step_refused(name, step, policy, f"{program} has no such step before a float layer")
        elif type(module).__module__.startswith("posttrain.") and not isinstance(module, PackedLinear):
            raise PosttrainError(
                f"{name} is a module of posttrain's own, {type(module).__name__} ({method_of(policy)}), which "
                f"{program} does not hold; expected a dense model whose linear layers alone are compressed"
            )


def _modules(module: nn.Module, name: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules by name, without what is inside of linear layers."""
    yield name, module
    if not isinstance(module, PackedLinear | TransformedLinear):
        for last, child in module.named_children():
            yield from _modules(child, f"{name}.{last}" if name else last)


def input_steps(layer: PackedLinear | TransformedLinear) -> list[InputStep]:
    """What is done to the inputs of a layer when the model runs."""
    return [step for step in layer.inputs or () if isinstance(step, InputStep)]


def step_refused(name: str, step: InputStep, policy: CausalPolicy, why: str) -> PosttrainError:
    return PosttrainError(
        f"the inputs of {name} go through a step of kind {step.kind!r} as the model runs ({method_of(policy)}); {why}"
    )
