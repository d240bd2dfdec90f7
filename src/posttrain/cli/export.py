"""`posttrain export`: a model in the format of another program."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL = typer.Argument(
    metavar="FOLDER",
    help="A folder that posttrain quantize wrote; for gguf any model: a folder, hub id, bundled name or lab:NAME.",
    show_default=False,
)
FORMAT = typer.Option(
    help="compressed-tensors (a folder for vLLM and transformers) or gguf (a file for llama.cpp).", show_default=False
)
OUTPUT = typer.Option(
    metavar="PATH",
    help="The folder or file to write (default: runs/FOLDER-compressed-tensors, runs/FOLDER.gguf).",
    show_default=False,
)
DTYPE = typer.Option(
    help="How what is not written as codes is stored: f32, f16, bf16, and in gguf q8_0 (default: the shortest float "
    "type that is exact).",
    show_default=False,
)


def export(
    model: Annotated[str, MODEL],
    format: Annotated[str, FORMAT],
    output: Annotated[Path | None, OUTPUT] = None,
    dtype: Annotated[str | None, DTYPE] = None,
) -> None:
    """Write a model for another program to load.

    The codes of quantized layers are written as they are stored, never quantized again: the exported model computes
    what this one computes. What a format does not hold is an error that says what it does hold.
    """
    from posttrain.cli.compression import slug
    from posttrain.compress.export.exported import export as export_model
    from posttrain.compress.measure import in_megabytes

    path = output or Path("runs") / f"{slug(model)}{'.gguf' if format == 'gguf' else f'-{format}'}"
    found = export_model(model, path, format, dtype=dtype)
    stored = ", ".join(f"{count} as {how}" for how, count in found.stored.items())
    for name, value in (
        ("format", found.format), ("matrices", stored), ("size", in_megabytes(found.bytes)), ("written", found.path)
    ):  # fmt: skip
        print(f"{name:<8}  {value}")
