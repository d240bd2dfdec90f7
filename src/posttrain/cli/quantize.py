"""`posttrain quantize`: a model in few bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

MODEL = typer.Argument(help="A bundled name, folder, GGUF file, hub id or lab:NAME.", show_default=False)
CALIBRATION = typer.Option(
    metavar="FILE|TASK",
    help="What to calibrate on: a file of text or of rows, a hub id, or a task (a name, or YAML). By default problems "
    "that the lab makes, with their solutions.",
    show_default=False,
)
TEXT = typer.Option(
    metavar="FILE|TASK",
    help="What to measure perplexity on (default: the last tenth of the calibration text, which is kept back for it).",
    show_default=False,
)
SAMPLES = typer.Option(help="Windows of calibration text (default: the method's, mostly 64).", show_default=False)
LENGTH = typer.Option(help="Tokens of a window (default: the method's, mostly 512).", show_default=False)
SKIP = typer.Option(
    metavar="PATTERN", help="Layers to leave as they are: '*.down_proj'. May be given again.", show_default=False
)
SET = typer.Option("--set", metavar="KEY=VALUE", help="Any argument of the method: damping=0.05.", show_default=False)
OUTPUT = typer.Option(metavar="DIR", help="The folder to write (default: runs/MODEL-METHOD).", show_default=False)
SEED = typer.Option(help="Of the calibration windows and of everything random in the method.")


def quantize(
    model: Annotated[str, MODEL],
    method: Annotated[str, typer.Option(help="See posttrain methods list --family quantization.")] = "gptq",
    bits: Annotated[int | None, typer.Option(help="Of a weight (default: the method's).", show_default=False)] = None,
    group: Annotated[
        int | None,
        typer.Option(
            help="Weights that share a scale; 0 for a whole row (default: the method's, mostly 128).",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[str | None, CALIBRATION] = None,
    text: Annotated[str | None, TEXT] = None,
    samples: Annotated[int | None, SAMPLES] = None,
    length: Annotated[int | None, LENGTH] = None,
    skip: Annotated[list[str] | None, SKIP] = None,
    overrides: Annotated[list[str] | None, SET] = None,
    output: Annotated[Path | None, OUTPUT] = None,
    seed: Annotated[int, SEED] = 0,
) -> None:
    """Quantize a model.

    Writes a folder that every command reads in the place of a model, with the packed weights in it; and tells
    perplexity before and after on text that was not calibrated on, bits a weight, sizes and time.
    """
    from posttrain.cli.compression import Asked, compress
    from posttrain.cli.train import given_settings

    given = given_settings({"bits": bits, "group": group}, overrides or [])
    compress(
        Asked("quantization", model, method, given, calibration, text, samples, length, tuple(skip or ()), output, seed)
    )
