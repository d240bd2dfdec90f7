"""Calibration text: windows of tokens from a file, from rows of data, or from a task, drawn by seed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain.compress.walk import Batch
from posttrain.evaluation.task import Task
from posttrain.trajectory import PosttrainError

if TYPE_CHECKING:
    from posttrain.models.causal import CausalPolicy

TOKENS_A_BATCH = 4096


def windows(tokens: Tensor, samples: int, length: int, seed: int = 0) -> list[Tensor]:
    """`samples` windows of `length` tokens at random places of `[tokens]`, drawn by seed; fewer tokens give one window.

    Windows do not overlap more than chance has it; a text shorter than a window is taken whole.
    """
    if not len(tokens):
        raise PosttrainError("calibration is empty; expected text")
    if len(tokens) <= length:
        return [tokens]
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(tokens) - length + 1, (samples,), generator=draw)
    return [tokens[s : s + length] for s in starts.tolist()]


def token_stream(policy: CausalPolicy, source: str | Path | Task | Sequence[str]) -> Tensor:
    """`[tokens]` int64 of a text file, of rows of a data file (prompt, answer and text columns), a task's prompts with
    their solutions, or of texts.
    """
    texts = _texts(source)
    joined = [t for t in texts if t.strip()]
    if not joined:
        raise PosttrainError(f"calibration {str(source)[:80]!r} holds no text; expected a file of text, rows or a task")
    encoded: Any = policy.tokenizer("\n\n".join(joined), add_special_tokens=False, return_tensors="pt", verbose=False)
    return encoded["input_ids"][0]


def _texts(source: str | Path | Task | Sequence[str]) -> list[str]:
    if isinstance(source, Task):
        return [f"{item.question}\n{item.solution or item.answer or ''}" for item in source.train]
    if not isinstance(source, str | Path):
        return list(source)
    path = Path(source).expanduser()
    if path.suffix in (".txt", ".md") or (
        path.is_file() and not path.name.endswith((".jsonl", ".json", ".csv", ".parquet", ".gz"))
    ):
        try:
            return [path.read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise PosttrainError(f"cannot read calibration text {path}: {error}") from error
    from posttrain.data.sources import read_rows

    found = []
    for row in read_rows(str(source)):
        if row.error is not None:
            raise row.error
        found.append("\n".join(str(v) for v in row.values.values() if isinstance(v, str)))
    return found


def calibration_batches(
    policy: CausalPolicy, source: str | Path | Task | Sequence[str], samples: int, length: int, seed: int = 0
) -> list[Batch]:
    """Batches of calibration windows as keyword arguments of the model's forward pass, about 4,096 tokens each."""
    length = min(length, policy.max_length)
    found = windows(token_stream(policy, source), samples, length, seed)
    rows = max(1, TOKENS_A_BATCH // len(found[0]))
    return [
        {"input_ids": torch.stack(found[i : i + rows]).to(policy.device), "use_cache": False}
        for i in range(0, len(found), rows)
    ]
