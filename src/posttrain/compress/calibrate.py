"""Calibration text: windows of tokens from a file, from rows of data, or from a task, drawn by seed; and the text
beside it that a compressed model is measured on.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from posttrain.compress.calls import Batch
from posttrain.compress.method import Calibrated
from posttrain.data.rows import describe
from posttrain.data.sources import EXTENSIONS, SAVED, read_rows
from posttrain.evaluation import perplexity
from posttrain.evaluation.task import Task
from posttrain.evaluation.tasks import task_from
from posttrain.trajectory import Group, PosttrainError

if TYPE_CHECKING:
    from posttrain.models.causal import CausalPolicy

TOKENS_A_BATCH = 4096
KEPT_BACK = 0.1  # the end of a text, that is measured on
WINDOWS = 64  # measured on at most
TEXT = (".txt", ".md")
ROWS = (*EXTENSIONS, ".gz")
EXPECTED = "a file of text or of rows, a hub id, texts, or a task"
Text = str | Path | Task | Sequence[str]


def text_of(given: str | Path | Task | Mapping[str, Any] | Sequence[str]) -> Text:
    """What a user gives as text: a file of text or of rows, a hub id (`owner/name`), texts; or a task, as `task_from`
    takes it: a name of reasoning-gym, or a mapping. A file that is not there is told at once.
    """
    if isinstance(given, Mapping):
        return task_from(given)
    if isinstance(given, Task):
        return given
    if not isinstance(given, str | Path):
        texts = list(given) if isinstance(given, Iterable) else [given]
        if wrong := next((text for text in texts if not isinstance(text, str)), None):
            raise PosttrainError(f"the calibration text is {describe(wrong)}; expected {EXPECTED}")
        return texts
    path, name = Path(given).expanduser(), str(given)
    if not name.strip():
        raise PosttrainError(f"the name of the text is empty; expected {EXPECTED}")
    if path.is_dir() and not any((path / file).is_file() for file in SAVED):
        files = sorted(file.name for file in path.iterdir() if file.suffix.lower() in (*TEXT, *ROWS))
        hint = f", such as {path / files[0]}" if files else ""
        raise PosttrainError(f"{name} is a folder and no data set; expected {EXPECTED}{hint}")
    if path.suffix.lower() in TEXT and not path.is_file():
        raise PosttrainError(f"no file {name}; expected a file of text or of rows, a hub id, or a task")
    if path.suffix.lower() in ROWS and not path.exists():
        read_rows(name)  # which names the nearest files
    if path.exists() or path.suffix.lower() in ROWS or "/" in name:
        return given
    try:
        return task_from(name)
    except PosttrainError as error:
        raise PosttrainError(f"no file {name}, and no task of that name: {error}") from None


def token_stream(policy: CausalPolicy, source: Text) -> Tensor:
    """`[tokens]` int64 of a text file, of the rows of a data file (all texts of a row), of a task's training problems
    with their solutions, or of texts.
    """
    joined = [t for t in _texts(source) if t.strip()]
    if not joined:
        raise PosttrainError(f"there is no text in {_told(source)}; expected a file of text, rows or a task")
    encoded: Any = policy.tokenizer("\n\n".join(joined), add_special_tokens=False, return_tensors="pt", verbose=False)
    return encoded["input_ids"][0]


def _told(source: Text) -> str:
    if isinstance(source, Task):
        return f"task {source.name}"
    return str(source) if isinstance(source, str | Path) else "the texts given"


def _texts(source: Text) -> list[str]:
    if isinstance(source, Task):
        return [f"{item.question}\n{item.solution or item.answer or ''}" for item in source.train]
    if not isinstance(source, str | Path):
        return list(source)
    path = Path(source).expanduser()
    if path.suffix.lower() in TEXT or (path.is_file() and path.suffix.lower() not in ROWS):
        try:
            return [path.read_text(encoding="utf-8")]
        except OSError as error:
            raise PosttrainError(f"cannot read {path}: {error.strerror or error}; expected a file of text") from error
        except UnicodeDecodeError as error:
            raise PosttrainError(f"{path} is no text in UTF-8 ({error.reason} at byte {error.start})") from error
    found = []
    for row in read_rows(str(source)):
        if row.error is not None:
            raise row.error
        found.append("\n".join(str(v) for v in row.values.values() if isinstance(v, str)))
    return found


def kept_back(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """A stream without its last tenth, and that tenth: what is calibrated on, and what is measured on."""
    end = len(tokens) - round(KEPT_BACK * len(tokens))
    if end < 2 or len(tokens) - end < 2:
        raise PosttrainError(
            f"the text has {len(tokens)} tokens, of which the last tenth is kept back to measure on; expected at least "
            f"20, or another text to measure on"
        )
    return tokens[:end], tokens[end:]


def windows(tokens: Tensor, samples: int, length: int, seed: int = 0) -> list[Tensor]:
    """`samples` windows of `length` tokens at random places of `[tokens]`, drawn by seed.

    Windows do not overlap more than chance has it. A text that is no longer than a window is taken whole, once.
    """
    if samples < 1 or length < 1:
        raise PosttrainError(f"calibration is {samples} windows of {length} tokens; expected at least 1 of each")
    if not len(tokens):
        raise PosttrainError("calibration is empty; expected text")
    if len(tokens) <= length:
        return [tokens]
    draw = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(tokens) - length + 1, (samples,), generator=draw)
    return [tokens[s : s + length] for s in starts.tolist()]


def window_batches(policy: CausalPolicy, tokens: Tensor, samples: int, length: int, seed: int = 0) -> list[Batch]:
    """Batches of windows as keyword arguments of the model's forward pass, about 4,096 tokens each; windows are no
    longer than the model's context.
    """
    found = windows(tokens, samples, min(length, policy.max_length), seed)
    rows = max(1, TOKENS_A_BATCH // len(found[0]))
    return [
        {"input_ids": torch.stack(found[i : i + rows]).to(policy.device), "use_cache": False}
        for i in range(0, len(found), rows)
    ]


def calibration_batches(policy: CausalPolicy, source: Text, samples: int, length: int, seed: int = 0) -> list[Batch]:
    """Batches of windows of a source (see `window_batches`)."""
    return window_batches(policy, token_stream(policy, source), samples, length, seed)


def whole_sequences(groups: Iterable[Group]) -> list[Batch]:
    """Batches of whole sequences, those of one length together, so that nothing is padded."""
    by_length: dict[int, list[Tensor]] = {}
    for group in groups:
        for trajectory in group.trajectories:
            by_length.setdefault(trajectory.length, []).append(trajectory.tokens)
    found: list[Batch] = []
    for length, sequences in sorted(by_length.items()):
        rows = max(1, TOKENS_A_BATCH // length)
        parts = (sequences[i : i + rows] for i in range(0, len(sequences), rows))
        found += [{"input_ids": torch.stack(part), "use_cache": False} for part in parts]
    return found


class Texts(Protocol):
    """What a model is calibrated on, and what it is measured on, which holds nothing of the first.

    calibrated_on, measured_on: what they are, in words.
    """

    @property
    def calibrated_on(self) -> str: ...

    @property
    def measured_on(self) -> str: ...

    def batches(self, policy: CausalPolicy, much: Calibrated, seed: int) -> list[Batch]:
        """Calibration text drawn by seed."""
        ...

    def unseen(self, policy: CausalPolicy, length: int) -> list[Group]:
        """Windows to predict, of `length` tokens where there is a choice."""
        ...


@dataclass(frozen=True, eq=False)
class Streams:
    """Two streams of tokens, of which windows are cut (`Texts`)."""

    calibration: Tensor
    rest: Tensor
    calibrated_on: str
    measured_on: str

    def batches(self, policy: CausalPolicy, much: Calibrated, seed: int) -> list[Batch]:
        return window_batches(policy, self.calibration, much.samples, much.length, seed)

    def unseen(self, policy: CausalPolicy, length: int) -> list[Group]:
        """The first 64 windows."""
        return perplexity.windows(self.rest, min(length, policy.max_length), WINDOWS)


def streams(policy: CausalPolicy, source: Text, text: Text | None = None, name: str = "") -> Streams:
    """Calibration on a source, and measuring on its last tenth, which is kept back for it, or on another text.

    name: of the source, in words.
    """
    tokens, told = token_stream(policy, source), name or _told(source)
    if text is not None:
        return Streams(tokens, token_stream(policy, text), told, _told(text))
    calibration, rest = kept_back(tokens)
    return Streams(calibration, rest, f"{told} but for the last tenth", f"the last tenth of {told}")
