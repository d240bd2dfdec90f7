"""Folders of compressed models: the configuration says how each packed layer is stored, one safetensors file holds what
is stored. Beside them lie the tokenizer and the generation configuration, as in any `transformers` folder.
"""

from __future__ import annotations

import json
import os
import pkgutil
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from posttrain.compress import rounded_attention
from posttrain.compress.experts import is_unfused, unfuse
from posttrain.compress.packed import inputs as steps
from posttrain.compress.packed import weight as weights
from posttrain.compress.packed.inputs import InputStep
from posttrain.compress.packed.linear import PackedLinear, TransformedLinear
from posttrain.compress.pipeline import LayerSummary, Summary, bits_and_bytes
from posttrain.compress.rounded_attention import AttentionRounding
from posttrain.compress.sparse_attention import ChosenTokens, heed
from posttrain.compress.stacks import replace_module
from posttrain.models.mixers import Mixer, take_apart
from posttrain.models.saving import open_as_the_rest
from posttrain.training.checkpoint import sync
from posttrain.trajectory import PosttrainError

if TYPE_CHECKING:
    from posttrain.models.causal import CausalPolicy

QUANT_METHOD = "posttrain"
VERSION = 1
CONFIG, WEIGHTS, GENERATION = "config.json", "model.safetensors", "generation_config.json"


# -- writing -----------------------------------------------------------------------------------------------------------


def save(policy: CausalPolicy, folder: str | Path, about: dict[str, Any] | None = None) -> Path:
    """Write a compressed model to a new or empty folder that `load` reads.

    It is written beside its place, synced and renamed: the folder is there whole or not at all.

    Args:
        about: what the configuration tells of the compression, as JSON values; the policy's own summary where None.
    Raises:
        PosttrainError: the folder holds something already; the disk is full or not writable.
    """
    folder = Path(folder)
    with new_folder(folder) as scratch:
        _write(policy, scratch, _summary(policy) if about is None else about)
    return folder


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write in, which at the end is on the disk and takes its place."""
    check_free(folder)
    target = folder.resolve()
    with beside(target, folder) as scratch:
        yield scratch
        for file in (*scratch.iterdir(), scratch):
            sync(file)
        if target.exists():
            target.rmdir()
        scratch.rename(target)
        sync(target.parent)


def check_free(folder: Path) -> None:
    """PosttrainError where a folder is no new or empty one."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise PosttrainError(f"{folder} exists already; choose another folder for the compressed model")


@contextmanager
def reserved(folder: Path) -> Iterator[None]:
    """A folder that will be written: it is free, can be written, and is kept from other processes meanwhile. Told
    before anything is computed.

    Folders that are made above it go again if nothing is put into them.
    """
    from filelock import FileLock, Timeout

    target = folder.resolve()
    lock = FileLock(str(target.with_name(f".{target.name}.lock")), timeout=0)
    made: list[Path] = []
    try:
        try:
            check_free(folder)
            made += [parent for parent in target.parents if not parent.exists()]
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=target.parent):
                pass
            lock.acquire()
        except Timeout:
            raise PosttrainError(
                f"{folder} is being written by another process; wait for it, or choose another folder"
            ) from None
        except OSError as error:
            raise _unwritable(folder, error) from error
        try:
            check_free(folder)  # whoever held the lock until now may have written it
            yield
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)
            lock.release()
    finally:
        for parent in made:
            with suppress(OSError):  # there is something in it
                parent.rmdir()


def save_somewhere(policy: CausalPolicy, folder: Path) -> tuple[Path, PosttrainError | None]:
    """Write a compressed model as `save` does; where that fails, under `runs/` or to a temporary folder instead, so
    that the work is not lost.

    Returns:
        the folder that was written, and what was wrong with the one that was asked for. Raises what was wrong with it
        where there is no room anywhere.
    """
    try:
        return save(policy, folder), None
    except PosttrainError as error:
        wrong = error
    for place in (Path("runs"), Path(tempfile.gettempdir())):
        names = (place / f"{folder.resolve().name}{end}" for end in ("", *(f"-{n}" for n in range(2, 100))))
        other = next((name for name in names if not name.exists()), None)
        if other is not None:
            with suppress(PosttrainError):
                return save(policy, other), wrong
    raise wrong


@contextmanager
def beside(target: Path, told: Path) -> Iterator[Path]:
    """A folder to write in beside the target, gone at the end; what killed processes left there goes first."""
    scratch = target.with_name(f".{target.name}.writing-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".{target.name}.writing-*"):
            if not _at_work(left.name.rpartition("-")[2]):
                shutil.rmtree(left, ignore_errors=True)
        scratch.mkdir()
        yield scratch
    except (OSError, SafetensorError) as error:
        raise _unwritable(told, error) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _at_work(process: str) -> bool:
    """Whether another process of that number is there."""
    if process == str(os.getpid()):  # this one writes nothing yet: the folder is of one before it
        return False
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:  # of another user
        return True
    return True


def _unwritable(folder: Path, error: Exception) -> PosttrainError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
    if isinstance(error, FileExistsError):
        reason = f"{error.filename} is no folder"
    return PosttrainError(
        f"cannot write the compressed model to {folder}: {reason}; free some space or choose another folder"
    )


def _write(policy: CausalPolicy, folder: Path, about: dict[str, Any]) -> None:
    model: Any = policy.base
    config = plain_config(model)
    modules = dict(model.named_modules())
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "version": VERSION,
        "about": about,
        "unfused": is_unfused(model),
        "layers": {n: _described(m) for n, m in modules.items() if isinstance(m, PackedLinear | TransformedLinear)},
        "attention": {n.rpartition(".")[0]: m.settings() for n, m in modules.items() if isinstance(m, ChosenTokens)},
        "rounded": {n.rpartition(".")[0]: m.settings() for n, m in modules.items() if isinstance(m, AttentionRounding)},
        "mixers": {n: _steps_of(m) for n, m in modules.items() if isinstance(m, Mixer)},
        "biases": [n for n, m in modules.items() if type(m) is nn.Linear and m.bias is not None],
    }
    write_model(policy, folder, config, tensors(model))


def plain_config(model: Any) -> dict[str, Any]:
    """The model's configuration as JSON values, with what a transform has untied."""
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    config.pop("_name_or_path", None)
    inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
    if outer is not None and outer.weight is not inner.weight:
        config["tie_word_embeddings"] = False  # whatever the model said before
    return config


def write_model(policy: CausalPolicy, folder: Path, config: dict[str, Any], state: dict[str, Tensor]) -> None:
    """A folder as `transformers` has it: configuration, tensors, generation configuration and tokenizer."""
    from safetensors.torch import save_file

    model: Any = policy.base
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(json.dumps(config, indent=1, default=str) + "\n", encoding="utf-8")
    open_as_the_rest(folder)
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)


def _described(layer: PackedLinear | TransformedLinear) -> dict[str, Any]:
    """How a layer is stored; a transformed layer that was left float has no packed weight."""
    weight = weights.written(layer.weight) if isinstance(layer, PackedLinear) else None
    return {"weight": weight, "bias": layer.bias is not None, "inputs": steps.written(layer.inputs)}


def _steps_of(mixer: Mixer) -> dict[str, Any]:
    """What a mixer rounds, by place."""
    return {place: steps.written(found) for place, found in mixer.rounding.items() if isinstance(found, nn.Sequential)}


def tensors(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, each parameter once: one that is tied to another is left out, and tied again on loading."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    seen: set[tuple[int, torch.Size]] = set()
    found = {}
    for name, tensor in model.state_dict().items():
        place = (tensor.data_ptr(), tensor.shape)
        if name in parameters and tensor.numel() and place in seen:
            continue
        shares = tensor.untyped_storage().nbytes() > tensor.numel() * tensor.element_size() or place in seen
        seen.add(place)
        found[name] = tensor.contiguous().clone() if shares else tensor.contiguous()
    return found


def _summary(policy: CausalPolicy) -> dict[str, Any]:
    done = getattr(policy, "compression", None)
    return asdict(done) if isinstance(done, Summary) else {}


# -- reading -----------------------------------------------------------------------------------------------------------


def is_compressed(folder: Path) -> bool:
    """Whether a folder's configuration says that `save` wrote it."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return bool((config.get("quantization_config") or {}).get("quant_method") == QUANT_METHOD)
    except (OSError, ValueError, AttributeError):
        return False


def load_folder(folder: Path, dtype: torch.dtype) -> tuple[Any, Any, Summary]:
    """The model, the tokenizer and the summary of a folder that `save` wrote.

    Only what is packed is ever in memory, never the float weights of packed layers.
    Raises PosttrainError for a folder of another version, one that is damaged, and one with something missing.
    """
    from transformers import AutoTokenizer, GenerationConfig

    described = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    quantization = described.pop("quantization_config")
    if quantization.get("version") != VERSION:
        raise PosttrainError(
            f"{folder} is in version {quantization.get('version')} of the format for compressed models; this posttrain "
            f"reads version {VERSION}: use the posttrain that wrote it, or compress the float model again"
        )
    with _readable(folder):
        model = _empty(described, quantization, dtype)
        _fill(model, _stored(folder), folder, described.get("dtype"), dtype)
        if (folder / GENERATION).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        done = _done(model, quantization["about"])
    return model.requires_grad_(False).eval(), tokenizer, done


@contextmanager
def _readable(folder: Path) -> Iterator[None]:
    """Whatever a library says of a folder that it cannot read becomes one line."""
    try:
        yield
    except PosttrainError:
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:240]
        raise PosttrainError(
            f"{folder} is damaged, or no compressed model of posttrain ({reason}); compress the float model again"
        ) from error


def _empty(described: dict[str, Any], quantization: dict[str, Any], dtype: torch.dtype) -> Any:
    """The model with packed layers of zeros in their places, and its float parameters not yet in memory."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**described)
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    if quantization["unfused"]:
        unfuse(model)
    if quantization.get("mixers"):
        take_apart(model, tried=False)
    _know_all_formats()
    for name, places in quantization.get("mixers", {}).items():
        for place, described_steps in places.items():
            model.get_submodule(name).rounding[place] = steps.from_written(described_steps)
    for name, layer in quantization["layers"].items():
        replace_module(model, name, _layer(model.get_submodule(name), layer, dtype))
    for name, settings in quantization.get("attention", {}).items():
        model.get_submodule(name).token_choice = ChosenTokens(**settings)
    if quantization.get("attention"):
        heed(model)
    for name, settings in quantization.get("rounded", {}).items():
        model.get_submodule(name).attention_rounding = AttentionRounding.of_settings(settings)
    if quantization.get("rounded"):
        rounded_attention.heed(model)
    for name in quantization["biases"]:
        linear = model.get_submodule(name)
        if linear.bias is None:  # a transform added it
            linear.bias = nn.Parameter(torch.empty(linear.out_features, device="meta", dtype=dtype))
    return model


def _layer(there: nn.Module, described: dict[str, Any], dtype: torch.dtype) -> nn.Module:
    inputs = steps.from_written(described["inputs"])
    if described["weight"] is not None:
        weight = weights.from_written(described["weight"])
        bias = torch.zeros(weight.shape[0], dtype=dtype) if described["bias"] else None
        return PackedLinear(weight, bias, inputs)
    assert isinstance(there, nn.Linear)
    if described["bias"] and there.bias is None:
        there.bias = nn.Parameter(torch.empty(there.out_features, device="meta", dtype=dtype))
    return TransformedLinear.of(there, inputs if inputs is not None else nn.Sequential())


def _know_all_formats() -> None:
    """Import every module of this package: formats and steps are known once their classes are defined."""
    package = import_module(__name__.rpartition(".")[0])
    for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if not module.name.rpartition(".")[2].startswith("_"):  # the library of kernels is no Python module
            import_module(module.name)


def _stored(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    file = folder / WEIGHTS
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise PosttrainError(
            f"cannot read {file}: {' '.join(str(error).split())[:200]}; it is cut short or damaged: copy it again, or "
            f"compress the float model again"
        ) from error


def _fill(model: Any, state: dict[str, Tensor], folder: Path, kept: str | None, dtype: torch.dtype) -> None:
    """Put what is stored in its place. kept: the precision that the float parts were stored in."""
    wanted = model.state_dict()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    packed = {f"{n}.{b}" for n, m in layers.items() for b, _ in m.named_buffers() if b != "bias"}
    packed |= {f"{n}.{b}" for n, m in model.named_modules() if isinstance(m, InputStep) for b, _ in m.named_buffers()}
    for name, tensor in state.items():
        if name not in wanted:
            raise PosttrainError(f"{folder / WEIGHTS} holds {name}, which its config.json does not know")
        there = wanted[name]
        if tensor.shape != there.shape or (name in packed and tensor.dtype != there.dtype):
            raise PosttrainError(
                f"{folder / WEIGHTS} holds {name} as {_kind(tensor)}; its config.json says {_kind(there)}"
            )
        # what the model keeps in another precision than its own (a router's bias, say) stays in it
        if name not in packed and tensor.is_floating_point() and str(tensor.dtype) == f"torch.{kept}":
            state[name] = tensor.to(dtype)
    found = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    floats = dict(model.named_parameters(remove_duplicate=False))
    missing = [n for n in found.missing_keys if n not in floats or floats[n].device.type == "meta"]
    if missing:
        raise PosttrainError(
            f"{folder / WEIGHTS} does not hold {missing[0]}"
            f"{f' and {len(missing) - 1} more tensors' if len(missing) > 1 else ''}, which its config.json speaks of"
        )


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _done(model: nn.Module, about: dict[str, Any]) -> Summary:
    """The summary as it was kept, with bits and bytes of the layers as they are."""
    packed = {n: m.weight for n, m in model.named_modules() if isinstance(m, PackedLinear)}
    told = about.get("layers")
    errors = {row["name"]: row["error"] for row in told} if isinstance(told, list) else {}
    bits, size = bits_and_bytes(model)
    order = [*(name for name in errors if name in packed), *(name for name in packed if name not in errors)]
    return Summary(
        str(about.get("method", "unknown")),
        float(about.get("seconds", 0.0)),
        [LayerSummary(n, packed[n].bits_per_weight, float(errors.get(n, float("nan")))) for n in order],
        bits,
        size,
        dict(about.get("arguments") or {}),
        list(about.get("left") or []),
    )
