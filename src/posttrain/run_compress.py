"""A stage of a run that compresses the model: its calibration, what it did in figures, and in words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from posttrain.compress.calibrate import calibration_batches
from posttrain.compress.calls import PROBE, Batch, uncalled
from posttrain.compress.measure import mean_error, model_bytes
from posttrain.compress.pipeline import Progress, check
from posttrain.compress.policy import CompressedPolicy, compressed_copy
from posttrain.evaluation.task import Task
from posttrain.methods.fitting import fitted
from posttrain.models.causal import CausalPolicy
from posttrain.recipe_compress import CompressSpec
from posttrain.trajectory import PosttrainError


def check_stage(stage: CompressSpec, policy: CausalPolicy, task: Task | None) -> None:
    """PosttrainError where the stage would fail on this model, told before the stages ahead of it are carried out."""
    stage, _ = suited(stage, policy)
    check(policy.base, stage.method, (*stage.skip, *uncalled(policy.base, _any_tokens(policy))))
    if stage.method.uses_data and stage.calibration is None and task is not None and not task.train:
        raise PosttrainError(
            f"{stage.method.name}: task {task.name} has no training problems to be calibrated on; give the stage "
            f"calibration: FILE"
        )


def compress_stage(
    stage: CompressSpec, policy: CausalPolicy, task: Task | None, seed: int, progress: Progress
) -> tuple[CompressedPolicy, dict[str, Any]]:
    """A compressed copy of the policy, and what became of it, as the run folder keeps it.

    bits: of a packed weight, everything counted; layers: how many were packed; error: relative Frobenius error of their
    weights; bytes_before, bytes_after: of the whole model; tokens: of calibration; adapted: what was changed of the
    method so that it suits the model, in words, or None.
    """
    stage, said = suited(stage, policy)
    batches = _batches(stage, policy, task, seed)
    made = compressed_copy(policy, stage.method, batches, skip=stage.skip, seed=seed, progress=progress)
    done = made.compression
    return made, {
        "method": stage.method.name,
        "bits": round(done.bits, 4),
        "layers": len(done.layers),
        "error": round(mean_error(made), 4),
        "bytes_before": model_bytes(policy.base),
        "bytes_after": model_bytes(made.base),
        "tokens": sum(batch["input_ids"].numel() for batch in batches) if stage.method.uses_data else 0,
        "adapted": said,
    }


def suited(stage: CompressSpec, policy: CausalPolicy) -> tuple[CompressSpec, str | None]:
    """The stage with a group that divides the policy's layers, where the recipe gives none (see `fitted`)."""
    method, said = fitted(stage.method, stage.given, policy.base, stage.skip)
    return replace(stage, method=method), said


def in_words(record: dict[str, Any]) -> str:
    """What `compress_stage` tells, in a sentence."""
    text = f"calibrated on {record['tokens']:,} tokens" if record["tokens"] else "without data"
    name = f"{record['method']}:" if record.get("adapted") is None else f"{record['adapted']};"
    return (
        f"{name} {record['layers']} layers of {record['bits']:.2f} bits a weight, {text}; the model takes "
        f"{size(record['bytes_after'])} instead of {size(record['bytes_before'])}; relative error of the weights "
        f"{record['error']:.3f}"
    )


def size(count: int) -> str:
    """Bytes in words: 84.1 MB."""
    value = float(count)
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.2f} GB"


def _batches(stage: CompressSpec, policy: CausalPolicy, task: Task | None, seed: int) -> list[Batch]:
    if not stage.method.uses_data:
        return _any_tokens(policy)
    source = stage.calibration if stage.calibration is not None else task
    assert source is not None, "a recipe without a task, whose stage names no text, is refused when it is read"
    much = stage.method.calibration
    return calibration_batches(policy, source, much.samples, much.length, seed)


def _any_tokens(policy: CausalPolicy) -> list[Batch]:
    """What shows which layers a model calls, and in which order, where no data is looked at."""
    return [{"input_ids": torch.arange(PROBE, device=policy.device)[None], "use_cache": False}]
