"""Atomic checkpoints: written beside their place, synced to disk, then renamed. safetensors and JSON, no pickle.

Where weights are spread over several processes each writes the rows that it holds into a file of its own, and any
number of processes reads from these files the rows that it needs.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from posttrain.processes import agree, everyone, here, lost, wait
from posttrain.trajectory import PosttrainError

STATE, TENSORS = "state.json", "tensors.safetensors"
PARTS = "parts"  # in the header of a file: which of its tensors are rows of larger ones, and which rows


@dataclass(frozen=True, slots=True)
class Part:
    """The rows that this process holds, from row `start` on, of a tensor of `shape` that is spread over several."""

    rows: Tensor
    start: int
    shape: tuple[int, ...]


def save(
    folder: Path, step: int, tensors: Mapping[str, Tensor | Part], state: dict[str, Any], keep: int | None = 1
) -> Path:
    """Write `folder/step-N`, unless it is there; older ones beyond `keep` (None: all are kept) are removed only once it
    is complete, and so is what a killed process left half written.

    Of several processes the first writes whole tensors and the state, and each its parts; the folder must be theirs
    together.

    Raises:
        PosttrainError: when the disk is full or not writable; the previous checkpoint is untouched.
    """
    target, main = at(folder, step), here().main
    if main:
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob(".writing-*"):
            shutil.rmtree(left, ignore_errors=True)
    if agree(complete(target) if main else None):
        return target
    scratch = folder / f".writing-{agree(os.getpid())}"
    try:
        if main:
            scratch.mkdir()
        wait()
        size = _write(scratch / (TENSORS if main else f"tensors-{here().rank}.safetensors"), tensors)
        # the state is written last and holds the sizes of the tensors: a folder with it and these sizes is complete
        sizes = everyone(size)
        if main:
            files = {f"tensors-{rank}.safetensors": n for rank, n in enumerate(sizes) if rank and n is not None}
            state = {**state, "step": step, "random": _python_random(), "bytes": size, "files": files}
            (scratch / STATE).write_text(json.dumps(state))
            for file in (scratch / STATE, scratch):
                sync(file)
            if target.exists():
                shutil.rmtree(target)
            scratch.rename(target)
            sync(folder)
        wait()
    except (OSError, RuntimeError) as error:  # safetensors reports a full disk as its own error, a RuntimeError
        shutil.rmtree(scratch, ignore_errors=True)
        if lost(error):
            raise
        raise PosttrainError(
            f"cannot write the checkpoint {target}: {error}; free some space or choose another run folder"
        ) from error
    except Exception as error:
        shutil.rmtree(scratch, ignore_errors=True)
        if type(error).__name__ == "SafetensorError":
            raise PosttrainError(
                f"cannot write the checkpoint {target}: {error}; free some space or choose another run folder"
            ) from error
        raise
    if keep is not None and main:
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return target


def _write(file: Path, tensors: Mapping[str, Tensor | Part]) -> int | None:
    """Write what this process has to, synced; returns the bytes, None where there is nothing to write."""
    parts = {name: t for name, t in tensors.items() if isinstance(t, Part)}
    held = {name: part.rows for name, part in parts.items()}
    if here().main:
        held |= {name: t for name, t in tensors.items() if not isinstance(t, Part)} | _rng_tensors()
    elif not parts:
        return None
    contiguous = {k: v.detach().contiguous() for k, v in held.items()}
    if parts:
        where = {name: [part.start, list(part.shape)] for name, part in parts.items()}
        save_file(contiguous, file, metadata={PARTS: json.dumps(where)})
    else:
        save_file(contiguous, file)
    sync(file)
    return file.stat().st_size


def keep_only(folder: Path, steps: Container[int]) -> None:
    """Remove the checkpoints of all other steps."""
    for found in folder.glob("step-*") if here().main else ():
        if int(found.name.removeprefix("step-")) not in steps:
            shutil.rmtree(found, ignore_errors=True)


def at(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{step:08d}"


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint; one that is cut short is passed over, all of them cut short is an error."""
    found = sorted(folder.glob("step-*"), reverse=True)
    for candidate in found:
        if complete(candidate):
            return candidate
    if found:
        raise PosttrainError(
            f"{found[0]} is incomplete (cut short) and there is no older checkpoint: start the run anew"
        )
    return None


def complete(checkpoint: Path) -> bool:
    try:
        state = json.loads((checkpoint / STATE).read_text())
        sizes = {TENSORS: state["bytes"], **state.get("files", {})}
        return all((checkpoint / file).stat().st_size == size for file, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load(checkpoint: Path) -> tuple[Stored, dict[str, Any]]:
    """Tensors and state of a complete checkpoint; the random generators are set as they were."""
    state = json.loads((checkpoint / STATE).read_text())
    _restore_rng(Stored([checkpoint / TENSORS], random=True), state["random"])
    return Stored([checkpoint / file for file in (TENSORS, *state.get("files", {}))]), state


class Stored(Mapping[str, Tensor]):
    """The tensors of a checkpoint by name, read when they are asked for, whole or some of their rows."""

    def __init__(self, files: list[Path], *, random: bool = False) -> None:
        self._pieces: dict[str, list[tuple[int, Any]]] = {}  # name: the first row that a file has of it, and that file
        self._shapes: dict[str, tuple[int, ...]] = {}
        for path in files:
            file = safe_open(path, framework="pt")
            parts = json.loads((file.metadata() or {}).get(PARTS, "{}"))
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                if name.startswith("random/") != random:
                    continue
                start, shape = parts.get(name) or (0, file.get_slice(name).get_shape())
                self._shapes[name] = tuple(shape)
                self._pieces.setdefault(name, []).append((start, file))

    def __getitem__(self, name: str) -> Tensor:
        pieces = self._pieces[name]
        if len(pieces) == 1:
            found: Tensor = pieces[0][1].get_tensor(name)
            return found
        return self.rows(name, 0, self._shapes[name][0])

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self._shapes[name]

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """The rows from `start` to before `stop`, whichever files they are in."""
        found = []
        for first, file in sorted(self._pieces[name], key=lambda piece: piece[0]):
            held = file.get_slice(name)
            low, high = max(start, first), min(stop, first + held.get_shape()[0])
            if low < high or start == stop:
                found.append(held[low - first : high - first] if low < high else held[0:0])
        return torch.cat(found)


def sync(path: Path) -> None:
    """Flush a file or a folder entry to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace a small file atomically; when it cannot be written, the old one stays and nothing beside it."""
    scratch = path.with_name(f".{path.name}.writing")
    try:
        scratch.write_text(text, encoding="utf-8")
        sync(scratch)
        scratch.replace(path)
    except OSError:
        scratch.unlink(missing_ok=True)
        raise


def _rng_tensors() -> dict[str, Tensor]:
    found = {"random/torch": torch.get_rng_state()}
    if torch.cuda.is_available() and not here().several:  # several processes seed each step anew
        found |= {f"random/cuda-{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return found


def _python_random() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - what other libraries draw from
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(kind), [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
    }


def _restore_rng(tensors: Mapping[str, Tensor], state: dict[str, Any]) -> None:
    torch.set_rng_state(tensors["random/torch"])
    kept = [name for name in tensors if name.startswith("random/cuda-")]
    for name in kept if len(kept) <= torch.cuda.device_count() and not here().several else ():
        torch.cuda.set_rng_state(tensors[name], int(name.rsplit("-", 1)[1]))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
