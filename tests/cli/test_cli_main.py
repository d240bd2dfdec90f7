"""The command line as a whole: quick to answer, and what becomes of errors."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import call

from posttrain import __version__
from posttrain.run import Interrupted
from posttrain.trajectory import PosttrainError

COMMANDS = [
    "run",
    "train",
    "evaluate",
    "compare",
    "study",
    "chat",
    "quantize",
    "prune",
    "export",
    "report",
    "serve",
    "plan",
    "methods",
    "methods list",
    "methods show",
    "models",
    "models pull",
]


def test_help_brings_no_heavy_library() -> None:
    """One process for all of them: the modules that any help brings stay in `sys.modules`."""
    program = (
        "import sys; from posttrain.cli.main import main\n"
        f"assert main(['--help']) == 0\n"
        f"for command in {COMMANDS!r}: assert main([*command.split(), '--help']) == 0, command\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy', 'scipy', 'plotly', 'rich', 'reasoning_gym'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: posttrain") == 1 + len(COMMANDS)


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_names_every_option(capsys: pytest.CaptureFixture[str], command: str) -> None:
    done = call(capsys, *command.split(), "--help")
    assert done.code == 0
    assert done.out.startswith(f"Usage: {' '.join(['posttrain', *command.split()])} ")
    assert not done.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys, "--version")
    assert (done.code, done.out) == (0, f"posttrain {__version__}\n")


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    done = call(capsys)
    assert done.code == 2
    assert "Commands:" in done.out + done.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rum"], "No such command 'rum'. Did you mean 'run'"),
        (["run", "--sed", "1"], "No such option: --sed"),
        (["run", "--seed", "one"], "Invalid value for '--seed'"),
        (["train", "model"], "Missing argument"),
        (["evaluate", "model"], "Missing option '--task'"),
    ],
)
def test_mistakes_in_the_command_line(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    done = call(capsys, *arguments)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (PosttrainError("a\nb \x1b[31mred"), 1, "error: a b \\x1b[31mred"),
        (Interrupted("stopped; go on with: x"), 130, "stopped; go on with: x"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            OSError(errno.ENOSPC, "No space left on device", "some/file"),
            1,
            "error: cannot write some/file: No space left on device; free some space and try again",
        ),
        (
            OSError(errno.EDQUOT, "Quota exceeded"),
            1,
            "error: cannot write: Quota exceeded; free some space and try again",
        ),
    ],
)
def test_errors_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, line: str
) -> None:
    monkeypatch.setattr("posttrain.report.build", _raising(error))
    done = call(capsys, "report", "x")
    assert (done.code, done.error) == (code, line)
    assert len(done.err.splitlines()) == 1


@pytest.mark.parametrize("error", [ValueError("a bug"), OSError(errno.EIO, "the disk is broken")])
def test_a_bug_shows_its_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    monkeypatch.setattr("posttrain.report.build", _raising(error))
    done = call(capsys, "report", "x")
    assert done.code == 1
    assert "Traceback" in done.err
    assert str(error) in done.err
    assert done.err.splitlines()[-1].startswith("posttrain: this is a fault of posttrain's own; please report it")


def _raising(error: BaseException) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        raise error

    return build


def test_a_closed_pipe_is_no_error() -> None:
    """`posttrain methods list | head -1`: whoever reads has gone before the table is written."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "posttrain.cli.main", "methods", "list", "--json"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_the_libraries_keep_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.utils import logging

    from posttrain.cli.quiet import ENVIRONMENT, quiet

    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "debug")  # what the user wants stays
    monkeypatch.setattr(logging, "_tqdm_active", True)
    quiet()
    assert not logging.is_progress_bar_enabled()
    assert os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] == "1"
    assert os.environ["TRANSFORMERS_VERBOSITY"] == "debug"


def test_warnings_of_its_own_are_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import posttrain.report

    def build(folder: Path) -> Path:
        warnings.warn("another's", stacklevel=1)
        warnings.warn_explicit("one\nmore \x1b[31mred", UserWarning, posttrain.report.__file__, 7)
        return folder

    monkeypatch.setattr("posttrain.report.build", build)
    with pytest.warns(UserWarning, match="another's"):  # as Python shows it
        done = call(capsys, "report", "x")
    assert done.code == 0
    assert done.err == "posttrain: warning: one more \\x1b[31mred\n"


def test_the_summaries_of_the_commands_are_whole(capsys: pytest.CaptureFixture[str]) -> None:
    commands = call(capsys, "--help").out.partition("Commands:")[2]
    assert len(commands.splitlines()) == 1 + len([name for name in COMMANDS if " " not in name])
    assert "..." not in commands
