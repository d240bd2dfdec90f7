"""Atomic checkpoints: written beside their place, synced to disk, then renamed. safetensors and JSON, no pickle."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Container
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.trajectory import PosttrainError

STATE, TENSORS = "state.json", "tensors.safetensors"


def save(folder: Path, step: int, tensors: dict[str, Tensor], state: dict[str, Any], keep: int | None = 1) -> Path:
    """Write `folder/step-N`, unless it is there; older ones beyond `keep` (None: all are kept) are removed only once it
    is complete, and so is what a killed process left half written.

    Raises:
        PosttrainError: when the disk is full or not writable; the previous checkpoint is untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = at(folder, step)
    scratch = folder / f".writing-{os.getpid()}"
    for left in folder.glob(".writing-*"):
        shutil.rmtree(left, ignore_errors=True)
    if complete(target):
        return target
    try:
        scratch.mkdir()
        contiguous = {k: v.detach().contiguous() for k, v in {**tensors, **_rng_tensors()}.items()}
        save_file(contiguous, scratch / TENSORS)
        # the state is written last and holds the size of the tensors: a folder with it and that size is complete
        state = {**state, "step": step, "random": _python_random(), "bytes": (scratch / TENSORS).stat().st_size}
        (scratch / STATE).write_text(json.dumps(state))
        for file in (scratch / TENSORS, scratch / STATE, scratch):
            sync(file)
        if target.exists():
            shutil.rmtree(target)
        scratch.rename(target)
        sync(folder)
    except (OSError, RuntimeError) as error:  # safetensors reports a full disk as its own error, a RuntimeError
        shutil.rmtree(scratch, ignore_errors=True)
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
    if keep is not None:
        for old in sorted(folder.glob("step-*"))[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
    return target


def keep_only(folder: Path, steps: Container[int]) -> None:
    """Remove the checkpoints of all other steps."""
    for found in folder.glob("step-*"):
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
        return bool((checkpoint / TENSORS).stat().st_size == state["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        return False


def load(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and state of a complete checkpoint; the random generators are set as they were."""
    state = json.loads((checkpoint / STATE).read_text())
    tensors = load_file(checkpoint / TENSORS)
    _restore_rng(tensors, state["random"])
    return tensors, state


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
    if torch.cuda.is_available():
        found |= {f"random/cuda-{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return found


def _python_random() -> dict[str, Any]:
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - what other libraries draw from
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(kind), [int(k) for k in keys], int(position), int(has_gauss), float(cached)],
    }


def _restore_rng(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    torch.set_rng_state(tensors.pop("random/torch"))
    for name in [n for n in tensors if n.startswith("random/cuda-")]:
        torch.cuda.set_rng_state(tensors.pop(name), int(name.rsplit("-", 1)[1]))
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))  # noqa: NPY002
