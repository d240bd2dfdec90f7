"""Folders in the format of the `compressed-tensors` library, which `transformers` and vLLM load.

Tensors of a layer, by the library's names: `weight_packed` (codes, lowest bits first, in 32-bit words), `weight_scale`,
`weight_zero_point` (packed down the rows), `weight_shape`. Where activations are rounded too: `weight` (int8),
`weight_scale`, `input_scale`, `input_zero_point`. Of FP8: `weight` and `weight_scale`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from posttrain.compress.activations.dynamic import DynamicStep
from posttrain.compress.activations.static import StaticStep
from posttrain.compress.export.floats import (
    DTYPES,
    check_exportable,
    exact_dtype,
    float_tensors,
    input_steps,
    method_of,
    packed_layers,
    rounded,
    step_refused,
)
from posttrain.compress.export.integers import Integers, integers_of
from posttrain.compress.files import new_folder, plain_config, write_model
from posttrain.compress.packed.bits import pack
from posttrain.compress.packed.float8 import DTYPES as FLOAT8
from posttrain.compress.packed.float8 import Float8Weight
from posttrain.compress.packed.levels import LevelsWeight
from posttrain.compress.packed.linear import PackedLinear
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.models.causal import CausalPolicy
from posttrain.trajectory import PosttrainError

PROGRAM = "compressed-tensors"
WEIGHTS = (
    f"{PROGRAM} holds integers of 2 to 8 bits with a scale and an integer zero point a group (rtn, gptq, awq, ... with "
    f"zero: integer or none) and FP8 (E4M3) with a scale a row"
)
INPUTS = f"{PROGRAM} holds integer activations of 8 bits, with a range for each token or one that calibration found"

Arguments = dict[str, Any]  # of weights or of activations, under the library's names
Named = dict[str, Tensor]


def write(
    policy: CausalPolicy, folder: Path, dtype: str | None, progress: Callable[[int, int], None]
) -> dict[str, int]:
    """Write a new or empty folder; returns how many layers are stored in which way.

    dtype: of the float parts, and what the model is then loaded in; by default the shortest that holds them exactly.
    progress: of layers.
    Raises PosttrainError for a model that is not quantized, and for what the format does not hold.
    """
    model: Any = policy.base
    layers = packed_layers(policy)
    if not layers:
        raise PosttrainError(
            f"{policy.name} is not quantized, and {PROGRAM} is a format for quantized models; quantize it first "
            f"(posttrain quantize MODEL --method gptq), or export gguf"
        )
    check_exportable(policy, PROGRAM)
    floats = float_tensors(policy)
    _check_architecture(model, {*floats, *(f"{name}.weight" for name in layers)})
    chosen = exact_dtype(floats.values()) if dtype is None else DTYPES[dtype]
    state = {name: rounded(name, t, chosen) if t.is_floating_point() else t for name, t in floats.items()}
    schemes: dict[str, list[str]] = {}
    widths = _group_widths(layers)
    for count, (name, layer) in enumerate(layers.items()):
        scheme, stored = _layer(name, layer, policy, widths)
        schemes.setdefault(json.dumps(scheme), []).append(name)
        if chosen == torch.float32:  # in which a program then computes; else it may round what it dequantizes to fp16
            stored = {n: t.to(chosen) if n.endswith("scale") else t for n, t in stored.items()}
        state |= {f"{name}.{suffix}": tensor.contiguous() for suffix, tensor in stored.items()}
        progress(count + 1, len(layers))
    config = plain_config(model) | {
        "architectures": [type(model).__name__],
        "dtype": str(chosen).removeprefix("torch."),
        "quantization_config": _quantization(model, schemes),
    }
    with new_folder(folder) as scratch:
        write_model(policy, scratch, config, state)
    return dict(Counter(_told(json.loads(text)) for text, names in schemes.items() for _ in names))


def _check_architecture(model: Any, names: set[str]) -> None:
    """PosttrainError for parameters that a transform has added, and which no other program would look for."""
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        plain = AutoModelForCausalLM.from_config(model.config)
    for name in sorted(names - set(plain.state_dict())):
        raise PosttrainError(
            f"{name} is a parameter that the method added and a plain {model.config.model_type} does not have; only "
            f"models of their plain architecture can be exported"
        )


# -- configuration -----------------------------------------------------------------------------------------------------


def _quantization(model: nn.Module, schemes: dict[str, list[str]]) -> dict[str, Any]:
    """The `quantization_config`. schemes: layers by their scheme, as JSON."""
    quantized = {name for names in schemes.values() for name in names}
    groups = {
        f"group_{number}": {"targets": ["Linear"] if len(schemes) == 1 else names, **json.loads(text)}
        for number, (text, names) in enumerate(schemes.items())
    }
    formats = {group["format"] for group in groups.values()}
    # the library packs zero points and makes no room for packed ones where transformers loads (0.20): there a model of
    # one scheme is to be dequantized as it is loaded, which it otherwise is when it first runs
    zeros = [g for g in groups.values() if g["format"] == "pack-quantized" and not g["weights"]["symmetric"]]
    return {
        **({"dequantize": True} if zeros and len(groups) == 1 else {}),
        "quant_method": PROGRAM,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and n not in quantized],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _told(scheme: dict[str, Any]) -> str:
    """A scheme in a few words: `W4 group 128, asymmetric`."""
    weights, inputs = scheme["weights"], scheme["input_activations"]
    kind = "FP8" if weights["type"] == "float" else f"W{weights['num_bits']}{'A8' if inputs else ''}"
    spread = f"group {weights['group_size']}" if weights["strategy"] == "group" else "channel"
    return f"{kind} {spread}{'' if weights['symmetric'] else ', asymmetric'}"


# -- layers ------------------------------------------------------------------------------------------------------------


def _group_widths(layers: dict[str, PackedLinear]) -> set[int]:
    """Columns of a group, in layers that have several and whose inputs are not rounded."""
    weights = [m.weight for m in layers.values() if isinstance(m.weight, UniformWeight | LevelsWeight) and not m.inputs]
    return {weight.shape[1] // weight.groups for weight in weights if weight.groups > 1}


def _layer(name: str, layer: PackedLinear, policy: CausalPolicy, widths: set[int]) -> tuple[dict[str, Any], Named]:
    """The scheme of a layer but for its targets, and its tensors. widths: of groups in the model.

    A layer that one group of the model's width covers is one of groups like the others: transformers (5.23) loads
    packed zero points of models with one scheme alone.
    """
    inputs, beside = _activations(name, layer, policy)
    weight, method = layer.weight, method_of(policy)
    if isinstance(weight, Float8Weight):
        if weight.kind != "e4m3" or weight.groups != 1 or inputs is not None:
            raise PosttrainError(
                f"{name} is stored as {weight.kind.upper()} with {weight.groups} groups a row"
                f"{'' if inputs is None else ' and rounded activations'} ({method}); {WEIGHTS}"
            )
        stored = {"weight": weight.codes.cpu().view(FLOAT8[weight.kind]), "weight_scale": weight.scale.cpu()}
        return _scheme("float-quantized", _arguments(8, type="float", strategy="channel"), None), stored
    found = integers_of(weight)
    if found is None:
        raise PosttrainError(f"{name} is stored in the format {weight.format!r} ({method}); {WEIGHTS}")
    if found.zero is None or not 2 <= found.bits <= 8:
        raise PosttrainError(
            f"{name} is stored in {found.bits} bits{' with float zero points' if found.zero is None else ''} "
            f"({method}); {WEIGHTS}"
        )
    if found.group_of is not None:
        raise PosttrainError(
            f"{name} has groups that are no runs of columns ({method}), which {PROGRAM} no longer holds; expected "
            f"static groups"
        )
    by_row = found.groups == 1 and (inputs is not None or found.width not in widths)
    if by_row and widths and inputs is None and not found.symmetric:
        raise PosttrainError(
            f"{name} has one group of all its {found.width} columns beside layers with groups of {min(widths)} "
            f"({method}), which transformers does not load with zero points; expected a group that divides the columns "
            f"of every layer, or zero: none"
        )
    arguments = _integer_arguments(found, by_row)
    if inputs is not None:
        half = 1 << (found.bits - 1)
        stored = {"weight": (found.codes.short() - half).to(torch.int8), "weight_scale": found.scale}
        if not found.symmetric:
            stored["weight_zero_point"] = (found.zero - half).to(torch.int8)
        return _scheme("int-quantized", arguments, inputs), stored | beside
    stored = {
        "weight_packed": _words(found.packed),
        "weight_scale": found.scale,
        "weight_shape": torch.tensor(found.shape),
    }
    if not found.symmetric:
        stored["weight_zero_point"] = _words(pack(found.zero.T, found.bits)).T
    return _scheme("pack-quantized", arguments, None), stored


def _integer_arguments(found: Integers, by_row: bool) -> Arguments:
    if by_row:
        return _arguments(found.bits, symmetric=found.symmetric, strategy="channel")
    return _arguments(found.bits, symmetric=found.symmetric, strategy="group", group_size=found.width)


def _activations(name: str, layer: PackedLinear, policy: CausalPolicy) -> tuple[Arguments | None, Named]:
    """How a layer's inputs are rounded, and the tensors of that."""
    steps = input_steps(layer)
    if not steps:
        return None, {}
    step = steps[0]
    if len(steps) == 1 and isinstance(step, DynamicStep) and (step.bits, step.per, step.clip, step.group) == (
        8, "token", 1.0, 0
    ):  # fmt: skip
        return _arguments(8, symmetric=step.symmetric, strategy="token", dynamic=True), {}
    if len(steps) == 1 and isinstance(step, StaticStep) and step.bits == 8:
        stored = {"input_scale": step.scale.cpu().reshape(1)}
        if not step.symmetric:
            stored["input_zero_point"] = (step.zero.cpu() - 128).to(torch.int8).reshape(1)
        return _arguments(8, symmetric=step.symmetric, strategy="tensor"), stored
    raise step_refused(name, step, policy, INPUTS)


def _scheme(format: str, weights: Arguments, inputs: Arguments | None) -> dict[str, Any]:
    return {"weights": weights, "input_activations": inputs, "output_activations": None, "format": format}


def _arguments(bits: int, **given: Any) -> Arguments:
    usual = {"type": "int", "symmetric": True, "group_size": None, "dynamic": False}
    return {"num_bits": bits, **usual, **given}


def _words(packed: Tensor) -> Tensor:
    """`[rows, bytes]` uint8, lowest bits first -> `[rows, words]` int32: the same bits, rows filled up to words."""
    return F.pad(packed, (0, -packed.shape[1] % 4)).contiguous().view(torch.int32)
