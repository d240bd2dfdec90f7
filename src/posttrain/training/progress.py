"""How far a stage is, and the best weights it had by what is held out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.models.causal import CausalPolicy
from posttrain.models.sharded import piece
from posttrain.training import checkpoint
from posttrain.training.parallel import part_of, stored

BEST = "best"


@dataclass(slots=True)
class Progress:
    """What a stage has done; the part of a checkpoint that is not tensors."""

    step: int = 0
    seconds: float = 0.0
    tokens: int = 0
    rollouts: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    best: float | None = None
    best_step: int = -1
    since_best: int = 0

    def as_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(slots=True)
class Outcome:
    """How a stage ended: `finished`, `early` (patience or budget) or `interrupted`."""

    status: str
    progress: Progress


class Best:
    """Keeps the weights that were best on what is held out, where a stage may end for want of better ones.

    folder: where they are written, with the checkpoints; None for nowhere. patience: evaluations without a better one
    that end the stage; 0 for never, and then none are kept. The best are those of `progress.best_step`.
    """

    def __init__(self, folder: Path | None, patience: int, learner: CausalPolicy) -> None:
        self.folder = None if folder is None else folder / BEST
        self.patience, self.learner = patience, learner
        self._saved = -1  # the best step that the newest checkpoint speaks of

    def judge(self, score: float, progress: Progress) -> bool:
        """Take note of a score, of which more is better; True when patience has run out."""
        if progress.best is None or score > progress.best:
            progress.best, progress.best_step, progress.since_best = score, progress.step, 0
            if self.patience and self.folder is not None:
                checkpoint.save(self.folder, progress.step, self._weights(), {}, keep=None)
                checkpoint.keep_only(self.folder, {progress.step, self._saved})
            return False
        progress.since_best += 1
        return bool(self.patience and progress.since_best >= self.patience)

    def restore(self, progress: Progress) -> bool:
        """Give the learner the best weights; False where it has them, or none were kept."""
        if not self.patience or self.folder is None or progress.best_step in (-1, progress.step):
            return False
        tensors, _ = checkpoint.load(checkpoint.at(self.folder, progress.best_step))
        with torch.no_grad():
            for name, parameter in self.learner.trainable_parameters():
                piece(parameter).copy_(stored(tensors, name, parameter))
        return True

    def keep(self, progress: Progress) -> None:
        """Of the best weights, only those that the newest checkpoint speaks of (a later one may be of lost steps)."""
        self._saved = progress.best_step
        if self.folder is not None:
            checkpoint.keep_only(self.folder, {self._saved})

    def _weights(self) -> dict[str, Tensor | checkpoint.Part]:
        return {name: part_of(p) for name, p in self.learner.trainable_parameters()}
