"""Checkpoints: whole or not there, without pickle, with the state of every random generator."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from posttrain.training import checkpoint
from posttrain.trajectory import PosttrainError

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.bfloat16), "c": torch.tensor(3)}


def steps(folder: Path) -> list[int]:
    return sorted(int(p.name.removeprefix("step-")) for p in folder.glob("step-*"))


def save(folder: Path, step: int, keep: int | None = 1, **state: Any) -> Path:
    return checkpoint.save(folder, step, TENSORS, state, keep)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    where = save(tmp_path / "c", 7, sampler={"taken": 3}, none=None)
    assert checkpoint.latest(tmp_path / "c") == where == checkpoint.at(tmp_path / "c", 7)
    tensors, state = checkpoint.load(where)
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == TENSORS[name].dtype
        assert torch.equal(tensor, TENSORS[name])
    assert (state["sampler"], state["none"], state["step"]) == ({"taken": 3}, None, 7)


def test_there_is_no_pickle(tmp_path: Path) -> None:
    save(tmp_path, 1)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert sorted(p.name for p in files) == ["state.json", "tensors.safetensors"]
    json.loads((tmp_path / "step-00000001" / "state.json").read_text())
    assert not any(b"\x80\x04\x95" in p.read_bytes() or b"PK\x03\x04" in p.read_bytes() for p in files)


def draws() -> tuple[Tensor, float, float, float, float]:
    return (
        torch.rand(3),
        random.random(),
        random.gauss(0, 1),
        float(np.random.rand()),  # noqa: NPY002
        float(np.random.randn()),  # noqa: NPY002
    )


def test_every_random_generator_goes_on_where_it_was(tmp_path: Path) -> None:
    for seed, draw_first in ((0, 0), (1, 1), (2, 3)):  # an odd number of gauss draws leaves one in the cache
        torch.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        for _ in range(draw_first):
            draws()
        where = save(tmp_path / str(seed), 1)
        expected = [draws() for _ in range(3)]
        for generator in (torch.manual_seed, random.seed, np.random.seed):
            generator(99)
        checkpoint.load(where)
        for one, other in zip([draws() for _ in range(3)], expected, strict=True):
            assert torch.equal(one[0], other[0])
            assert one[1:] == other[1:]


@pytest.mark.parametrize(("keep", "left"), [(1, [5]), (2, [4, 5]), (9, [1, 2, 3, 4, 5]), (None, [1, 2, 3, 4, 5])])
def test_keeps_the_newest(tmp_path: Path, keep: int | None, left: list[int]) -> None:
    for step in range(1, 6):
        save(tmp_path, step, keep)
    assert steps(tmp_path) == left


def test_keep_only(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, None)
    checkpoint.keep_only(tmp_path, {2, 7})
    assert steps(tmp_path) == [2]
    checkpoint.keep_only(tmp_path / "missing", {1})


def test_the_older_goes_only_when_the_newer_is_complete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    seen = []
    real = checkpoint.sync

    def sync(path: Path) -> None:
        seen.append((path.name, checkpoint.complete(tmp_path / "step-00000001"), steps(tmp_path)))
        real(path)

    monkeypatch.setattr(checkpoint, "sync", sync)
    save(tmp_path, 2)
    scratch = f".writing-{os.getpid()}"
    assert [name for name, *_ in seen] == ["tensors.safetensors", "state.json", scratch, tmp_path.name]
    assert all(complete for _, complete, _ in seen), "the older one stands until the newer one is on disk"
    assert [found for *_, found in seen] == [[1], [1], [1], [1, 2]], "synced before it is renamed"
    assert steps(tmp_path) == [2]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("cannot write")])
def test_a_failed_write_leaves_the_previous_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    save(tmp_path, 1)

    def fail(tensors: dict[str, Tensor], file: Path) -> None:
        Path(file).write_bytes(b"half")
        raise error

    monkeypatch.setattr(checkpoint, "save_file", fail)
    with pytest.raises(PosttrainError, match=r"cannot write the checkpoint .*step-00000002: .*free some space"):
        save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000001"


def test_a_bug_is_not_called_a_full_disk(tmp_path: Path) -> None:
    with pytest.raises(AttributeError):
        checkpoint.save(tmp_path, 1, {"a": None}, {})  # type: ignore[dict-item]
    assert list(tmp_path.iterdir()) == []


FULL_DISK = """
import resource, sys
from pathlib import Path
import torch
from posttrain.training import checkpoint
from posttrain.trajectory import PosttrainError
folder = Path(sys.argv[1])
checkpoint.save(folder, 1, {"a": torch.zeros(1000)}, {})
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))  # what a full disk looks like
try:
    checkpoint.save(folder, 2, {"a": torch.zeros(100_000)}, {})
except PosttrainError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit on file sizes here")
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.stdout.startswith(f"cannot write the checkpoint {tmp_path / 'step-00000002'}: ")
    assert done.stdout.count("\n") == 1
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    tensors, _ = checkpoint.load(tmp_path / "step-00000001")
    assert tensors["a"].shape == (1000,)


def cut(folder: Path, file: str) -> None:
    size = (folder / file).stat().st_size
    os.truncate(folder / file, size // 2)


@pytest.mark.parametrize("file", ["state.json", "tensors.safetensors"])
@pytest.mark.parametrize("gone", [True, False])
def test_one_that_is_cut_short_is_passed_over(tmp_path: Path, file: str, gone: bool) -> None:
    for step in (1, 2):
        save(tmp_path, step, keep=2)
    newest = tmp_path / "step-00000002"
    if gone:
        (newest / file).unlink()
    else:
        cut(newest, file)
    assert not checkpoint.complete(newest)
    assert checkpoint.latest(tmp_path) == tmp_path / "step-00000001"
    cut(tmp_path / "step-00000001", file)
    with pytest.raises(PosttrainError, match=r"step-00000002 is incomplete.*start the run anew"):
        checkpoint.latest(tmp_path)


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) is None
    assert checkpoint.latest(tmp_path / "missing") is None


def test_what_a_killed_writer_left_goes_with_the_next_save(tmp_path: Path) -> None:
    left = tmp_path / ".writing-1"
    left.mkdir()
    (left / "tensors.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path) is None, "it is no checkpoint"
    save(tmp_path, 1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_a_complete_one_is_not_written_again(tmp_path: Path) -> None:
    """A run that is stopped right after a checkpoint must not take it away to write the same one."""
    save(tmp_path, 1, mark="first")
    save(tmp_path, 1, mark="second")
    assert json.loads((tmp_path / "step-00000001" / "state.json").read_text())["mark"] == "first"
    cut(tmp_path / "step-00000001", "tensors.safetensors")
    save(tmp_path, 1, mark="third")
    assert checkpoint.load(tmp_path / "step-00000001")[1]["mark"] == "third"


def test_write_text_replaces_whole_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "run.json"
    checkpoint.write_text(file, "one ünïcode")
    assert file.read_text(encoding="utf-8") == "one ünïcode"

    def fail(path: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "sync", fail)
    with pytest.raises(OSError, match="No space"):
        checkpoint.write_text(file, "two")
    assert file.read_text(encoding="utf-8") == "one ünïcode"
