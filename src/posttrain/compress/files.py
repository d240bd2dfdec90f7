"""Folders of compressed models: the configuration says how each packed layer is stored, safetensors hold the rest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from posttrain.compress.packed import inputs as steps
from posttrain.compress.packed import weight as weights
from posttrain.compress.packed.linear import PackedLinear
from posttrain.compress.stacks import replace_module
from posttrain.trajectory import PosttrainError

if TYPE_CHECKING:
    from posttrain.models.causal import CausalPolicy

QUANT_METHOD = "posttrain"
VERSION = 1
WEIGHTS = "model.safetensors"


def save(policy: CausalPolicy, folder: str | Path, about: dict[str, Any] | None = None) -> Path:
    """Write a compressed model to a folder that `load` reads. about: what else the configuration should tell."""
    from safetensors.torch import save_file

    folder = Path(folder)
    if folder.exists() and any(folder.iterdir() if folder.is_dir() else [folder]):
        raise PosttrainError(f"{folder} exists; choose another folder for the compressed model")
    folder.mkdir(parents=True, exist_ok=True)
    model = policy.base
    packed = {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}
    layers = {
        name: {"weight": weights.written(m.weight), "bias": m.bias is not None, "inputs": steps.written(m.inputs)}
        for name, m in packed.items()
    }
    config = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD, "version": VERSION, "about": about or {}, "layers": layers
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_file(_tensors(model), folder / WEIGHTS, metadata={"format": "pt"})
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    return folder


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict, each storage once: a tensor that is tied to another is left out, and tied again on loading."""
    seen: set[int] = set()
    found = {}
    for name, tensor in model.state_dict().items():
        if tensor.data_ptr() in seen and tensor.numel():
            continue
        seen.add(tensor.data_ptr())
        found[name] = tensor.contiguous()
    return found


def is_compressed(folder: Path) -> bool:
    """Whether a folder's configuration says that `save` wrote it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return (config.get("quantization_config") or {}).get("quant_method") == QUANT_METHOD


def load_folder(folder: Path, dtype: torch.dtype) -> tuple[Any, Any]:
    """The model and tokenizer of a folder that `save` wrote; only what is packed is ever in memory, never the float
    weights of packed layers.
    """
    from accelerate import init_empty_weights
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    described = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = described.pop("quantization_config")
    if quantization.get("version") != VERSION:
        raise PosttrainError(
            f"{folder} was written in version {quantization.get('version')} of the format; this posttrain reads "
            f"version {VERSION}"
        )
    config = AutoConfig.for_model(**described)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for name, layer in quantization["layers"].items():
        weight = weights.from_written(layer["weight"])
        bias = torch.zeros(weight.shape[0], dtype=dtype) if layer["bias"] else None
        replace_module(model, name, PackedLinear(weight, bias, steps.from_written(layer["inputs"])))
    try:
        state = load_file(folder / WEIGHTS)
    except Exception as error:
        raise PosttrainError(f"cannot read {folder / WEIGHTS}: {' '.join(str(error).split())[:200]}") from error
    floats = dict(model.named_parameters())
    state = {name: t.to(dtype) if name in floats and t.is_floating_point() else t for name, t in state.items()}
    found = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    missing = [n for n, p in (*model.named_parameters(), *model.named_buffers()) if p.device.type == "meta"]
    if missing or found.unexpected_keys:
        wrong = (missing + list(found.unexpected_keys))[0]
        raise PosttrainError(f"{folder} does not hold what its config.json says: {wrong} is missing or too much")
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.requires_grad_(False).eval(), AutoTokenizer.from_pretrained(folder)
