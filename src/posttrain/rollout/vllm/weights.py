"""A policy's weights on their way to vLLM: files in a folder that both see, or the same in pieces over the wire.

They are what `save_pretrained` writes, so that every architecture has the names that vLLM loads, with adapters merged.
Their digest is their version: vLLM checks what arrived against it, and says it when asked what it holds.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from posttrain.models.causal import CausalPolicy
from posttrain.trajectory import PosttrainError

PIECE = 64 << 20  # bytes of weights in one message; a larger tensor has one of its own
PREFIX = "posttrain-vllm-"  # of the folder's name; the process that made it follows
BLOCK, PRIME = 1 << 18, 1_000_003  # of the checksum
MEMORY = Path("/dev/shm")  # a folder in memory, where the system has one


@dataclass(frozen=True)
class Weights:
    """Weights in files. folder: where; files: each safetensors file's SHA-256, by name."""

    folder: Path
    files: dict[str, str]

    @cached_property
    def version(self) -> str:
        """One name for all of it."""
        parts = "".join(f"{name} {digest}\n" for name, digest in sorted(self.files.items()))
        return hashlib.sha256(parts.encode()).hexdigest()[:32]

    def pieces(self, limit: int = PIECE) -> Iterator[bytes]:
        """The same tensors as safetensors of about `limit` bytes each."""
        from safetensors import safe_open
        from safetensors.torch import save

        held: dict[str, Tensor] = {}
        size = 0
        for name in sorted(self.files):
            with safe_open(str(self.folder / name), framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - no mapping
                    tensor = file.get_tensor(key)
                    if held and size + tensor.nbytes > limit:
                        yield save(held)
                        held, size = {}, 0
                    held[key] = tensor
                    size += tensor.nbytes
        if held:
            yield save(held)


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@torch.no_grad()
def fingerprint(policy: CausalPolicy) -> tuple[int, ...]:
    """A checksum of each parameter, computed where it lies: it changes with any bit of them.

    By content, since torch does not count every write: a fused optimizer's step leaves a tensor's version as it was.
    """
    sums = [_checksum(p) for p in policy.model.parameters()]
    return tuple(torch.stack(sums).tolist())


def _checksum(tensor: Tensor) -> Tensor:
    """The bits as integers, each times a number of its place, summed modulo 2^64: 0-d int64."""
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    flat = tensor.reshape(-1).view(whole)
    draw = torch.Generator().manual_seed(0)
    factors = torch.randint(-(1 << 62), 1 << 62, (min(len(flat), BLOCK),), generator=draw).to(flat.device) | 1
    total = torch.zeros((), dtype=torch.int64, device=flat.device)
    for block in flat.split(BLOCK):
        total = total * PRIME + (block.to(torch.int64) * factors[: len(block)]).sum()
    return total


class Exchange:
    """A folder of this process in which the newest weights lie, in memory where there is room.

    place: the folder to make it in (one that a server on another machine sees as well); None for this machine's.
    """

    def __init__(self, place: Path | None = None) -> None:
        self.place = place
        self.folder: Path | None = None
        self._count = 0

    def write(self, policy: CausalPolicy) -> Weights:
        """The policy's present weights; those written before them are removed."""
        root = self._open(policy)
        self._count += 1
        folder = root / f"weights-{self._count}"
        try:
            with _quiet():
                policy.save_weights(folder)
        except OSError as error:
            raise PosttrainError(
                f"cannot write the weights for vLLM to {root}: {error.strerror or error}; free some space, or name "
                f"another folder (exchange)"
            ) from error
        files = {file.name: file_digest(file) for file in sorted(folder.glob("*.safetensors"))}
        for old in root.glob("weights-*"):
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
        return Weights(folder, files)

    def model(self, policy: CausalPolicy, weights: Weights) -> Path:
        """A folder that vLLM starts from: weights, configuration and tokenizer."""
        assert self.folder is not None
        folder = self.folder / "model"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(weights.folder, folder, copy_function=_link)
        policy.tokenizer.save_pretrained(folder)
        return folder

    def close(self) -> None:
        """Remove the folder."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None

    def _open(self, policy: CausalPolicy) -> Path:
        if self.folder is None:
            place = self.place
            if place is None:  # twice the model at a time, and a margin
                needed = 2.5 * sum(p.nbytes for p in policy.model.parameters())
                roomy = MEMORY.is_dir() and os.access(MEMORY, os.W_OK) and shutil.disk_usage(MEMORY).free > needed
                place = MEMORY if roomy else Path(tempfile.gettempdir())
                sweep(place)
            try:
                self.folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{os.getpid()}-", dir=place))
            except OSError as error:
                raise PosttrainError(
                    f"cannot make a folder for weights in {place}: {error.strerror}; name another (exchange)"
                ) from error
        return self.folder


def sweep(place: Path) -> None:
    """Remove what processes that were killed have left: weights in memory are memory."""
    for old in place.glob(f"{PREFIX}*-*"):
        owner = old.name.removeprefix(PREFIX).partition("-")[0]
        try:
            os.kill(int(owner), 0)
        except ProcessLookupError:
            shutil.rmtree(old, ignore_errors=True)
        except (ValueError, OverflowError, PermissionError):  # of another user, or no folder of ours
            continue


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the bar that transformers draws for every file it writes."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
