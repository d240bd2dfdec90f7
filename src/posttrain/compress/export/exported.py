"""Writing a model for other programs to load: which format, where to, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from posttrain.compress.export import compressed_tensors, gguf_file
from posttrain.compress.export.floats import DTYPES
from posttrain.compress.files import check_free
from posttrain.models.causal import CausalPolicy
from posttrain.models.load import load
from posttrain.reward.names import unknown
from posttrain.terminal import Counter
from posttrain.trajectory import PosttrainError

FORMATS = {"compressed-tensors": tuple(DTYPES), "gguf": tuple(gguf_file.KINDS)}  # with the types of their float parts


@dataclass(frozen=True)
class Exported:
    """path: the folder, or the file. bytes: of all that was written. stored: matrices by how they are stored."""

    path: Path
    format: str
    bytes: int
    stored: dict[str, int]


def check(path: Path, format: str, dtype: str | None) -> None:
    """PosttrainError for a format or type that is unknown, and a place that is taken; before a model is loaded."""
    if format not in FORMATS:
        raise unknown("format", format, FORMATS)
    if dtype is not None and dtype not in FORMATS[format]:
        raise PosttrainError(f"dtype {dtype!r} is no type of {format}; expected {', '.join(FORMATS[format])}")
    if format == "gguf" and path.exists():
        raise PosttrainError(f"{path} exists already; choose another file for the exported model")
    check_free(path)


def export(
    model: str | Path | CausalPolicy, path: str | Path, format: str, *, dtype: str | None = None, show: bool = True
) -> Exported:
    """Write a model for another program to load, with the codes that are stored and never others.

    Args:
        model: what `load` takes, or a loaded policy; an adapter is merged first. For compressed-tensors it must be
            quantized.
        path: a folder that is new or empty (compressed-tensors), or a new file (gguf); it is there whole or not at all.
        format: `compressed-tensors` (for vLLM and transformers) or `gguf` (for llama.cpp).
        dtype: of what is not written as codes: `f32`, `f16`, `bf16`, in GGUF also `q8_0`; by default the shortest float
            type that holds it exactly. In GGUF, layers whose codes its types do not hold are stored so too, as values;
            without a dtype they are an error.
    Raises:
        PosttrainError: the format does not hold the model, or the path is taken or cannot be written.
    """
    path = Path(path)
    check(path, format, dtype)
    policy = model if isinstance(model, CausalPolicy) else load(model, precision="fp32", device="cpu")
    if policy.adapted:
        policy = CausalPolicy(policy.merged(), policy.tokenizer, policy.name)
    writing = compressed_tensors.write if format == "compressed-tensors" else gguf_file.write
    with Counter(f"{format}: tensors", "tensors", show=show) as progress:
        stored = writing(policy, path, dtype, progress)
    files = [path] if path.is_file() else list(path.iterdir())
    return Exported(path, format, sum(file.stat().st_size for file in files), stored)
