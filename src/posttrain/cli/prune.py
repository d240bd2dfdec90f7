"""`posttrain prune`: a model with weights left out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.quantize import CALIBRATION, LENGTH, MODEL, OUTPUT, SAMPLES, SEED, SET, SKIP, TEXT


def prune(
    model: Annotated[str, MODEL],
    method: Annotated[str, typer.Option(help="See posttrain methods list --family sparsity.", show_default=False)],
    sparsity: Annotated[
        float | None,
        typer.Option(help="Share of the weights that are left out (default: the method's).", show_default=False),
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
    """Prune a model.

    Writes a folder that every command reads in the place of a model; and tells perplexity before and after on text that
    was not calibrated on, bits a weight, sizes and time.
    """
    from posttrain.cli.compression import Asked, compress
    from posttrain.cli.train import given_settings

    given = given_settings({"sparsity": sparsity}, overrides or [])
    compress(
        Asked("sparsity", model, method, given, calibration, text, samples, length, tuple(skip or ()), output, seed)
    )
