"""The part of `posttrain evaluate` that decodes in many ways."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from posttrain.evaluation.task import Task


def evaluate_decoding(
    model: str,
    task: Task,
    axes: list[str],
    *,
    against: str | None,
    samples: int,
    holdout: int | None,
    max_tokens: int | None,
    temperature: float | None,
    seed: int,
    output: Path | None,
    page: Path | None,
) -> None:
    """Decode a task along a grid with a model, and beside another, and print what came out."""
    from posttrain.compress.measure import in_megabytes, model_bytes
    from posttrain.evaluation.decoding import decoding_sensitivity
    from posttrain.evaluation.decoding_grid import DecodingGrid
    from posttrain.models.load import load
    from posttrain.report import decoding as report
    from posttrain.terminal import Counter
    from posttrain.training.checkpoint import write_text
    from posttrain.trajectory import PosttrainError

    if against is not None and (against == model or against.endswith(".json")):
        raise PosttrainError(f"--against {against}: with --decoding, expected another model to measure beside {model}")
    for option, file in (("--output", output), ("--page", page)):
        if file is not None and not file.parent.is_dir():
            raise PosttrainError(f"{option} {file}: there is no folder {file.parent}; make it first")
    own = task.sampling
    base = replace(
        own,
        temperature=(own.temperature or 1.0) if temperature is None else temperature,
        max_tokens=own.max_tokens if max_tokens is None else max_tokens,
    )
    grid = DecodingGrid.of(axes, base)
    policies = {name: load(name) for name in ([model] if against is None else [against, model])}
    found = decoding_sensitivity(policies, task, grid, samples=samples, limit=holdout, seed=seed, counted=Counter)
    print(found)
    print("size: " + ", ".join(f"{name} {in_megabytes(model_bytes(p.model))}" for name, p in policies.items()))
    print(report.sentence(found))
    _write("--output", output, lambda file: write_text(file, found.to_json()))
    _write("--page", page, lambda file: report.write(found, file))
    if page is not None:
        print(f"page: {page}")


def _write(option: str, file: Path | None, write: Callable[[Path], None]) -> None:
    from posttrain.trajectory import PosttrainError

    if file is None:
        return
    try:
        write(file)
    except OSError as error:
        raise PosttrainError(f"{option} {file}: cannot be written: {error.strerror or error}") from error
