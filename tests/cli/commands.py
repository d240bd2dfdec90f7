"""What the tests of the command line share: a tiny model on disk, recipes for it, and a command's result."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from conftest import make_model, make_tokenizer
from posttrain.cli.main import main

TASK = {"reasoning_gym": "chain_sum", "terms": [2, 2], "digits": [1, 1], "train": 12, "heldout": 4}
SFT = {"sft": {"steps": 2, "batch": 2}}
GRPO = {"grpo": {"steps": 2, "batch": 2, "group": 2, "max_tokens": 4}}
EVALUATE = {"holdout": 4, "max_tokens": 4}


@dataclass(frozen=True)
class Result:
    """code: the exit code; out, err: what was written to standard output and error."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line that tells what went wrong; progress may stand before it, and nothing else."""
        *before, line = self.err.splitlines()
        assert line.startswith("posttrain: "), self.err
        assert not any(text.startswith(("posttrain: ", "Traceback")) for text in before), self.err
        return line.removeprefix("posttrain: ")


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> Result:
    """Run a command line in this process."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    return Result(code, *capsys.readouterr())


def make_folder(folder: Path, template: str | None = "", **overrides: Any) -> Path:
    """A tiny model with its tokenizer as a folder. template: a chat template; None for none."""
    tokenizer = make_tokenizer()
    if template != "":
        tokenizer.chat_template = template
    make_model(**overrides).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_recipe(folder: Path, model: Path | str, *stages: Any, **parts: Any) -> Path:
    """A recipe file: two steps of SFT on a few sums unless it says otherwise."""
    values = {"model": str(model), "task": TASK, "stages": list(stages) or [SFT], "evaluate": EVALUATE, **parts}
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}, sort_keys=False))
    return file


def write_rows(file: Path, *rows: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def status(folder: Path) -> str:
    """How a run stands."""
    return str(json.loads((folder / "run.json").read_text())["status"])


def weights(folder: Path) -> bytes:
    """The trained weights of a run, to the bit."""
    return (folder / "model" / "model.safetensors").read_bytes()


def write_reward(folder: Path, name: str, at: int, what: str) -> str:
    """A reward of 0 that does something at its call number `at` (counted over processes); returns its import path."""
    (folder / f"{name}.py").write_text(
        "import pathlib, signal, time\n"
        "def reward(completion, prompt):\n"
        f"    calls = pathlib.Path({str(folder / f'{name}.calls')!r})\n"
        "    number = int(calls.read_text()) + 1 if calls.exists() else 1\n"
        "    calls.write_text(str(number))\n"
        f"    if number == {at}:\n"
        f"        {what}\n"
        "    return 0.0\n"
    )
    return f"{folder / name}.py:reward"


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: to a program the same as a disk that is full (EFBIG in place of ENOSPC)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
