"""The command line: one file a command, put together here, and what becomes of errors."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated

import typer

from posttrain.cli import (
    chat,
    compare,
    evaluate,
    export,
    methods,
    models,
    plan,
    prune,
    quantize,
    report,
    run,
    serve,
    study,
    train,
)
from posttrain.cli.quiet import quiet

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

app = typer.Typer(
    name="posttrain",
    help="Post-training of language models: make a model better at a task, and see that it got better.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("run")(run.run)
app.command("train")(train.train)
app.command("evaluate")(evaluate.evaluate)
app.command("chat")(chat.chat)
app.command("quantize")(quantize.quantize)
app.command("prune")(prune.prune)
app.command("export")(export.export)
app.command("report")(report.report)
app.command("plan")(plan.plan)
app.command("serve")(serve.serve)
app.command("compare")(compare.compare)
app.command("study")(study.study)
app.add_typer(methods.app, name="methods")
app.add_typer(models.app, name="models")


def _version(wanted: bool) -> None:
    if wanted:
        from posttrain import __version__

        print(f"posttrain {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; returns the exit code.

    0: done. 1: an error, told in one line; one that is no fault of the user's is shown with its traceback. 2: a mistake
    in the command line. 130: interrupted.
    """
    quiet()
    asked = list(sys.argv[1:] if arguments is None else arguments)
    if _several() and next((a for a in asked if not a.startswith("-")), "run") not in ("run", "train"):
        return _fail("error: several processes carry out run and train alone; start this command without a launcher", 2)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a terminal that cannot show a character shows its number
    with _having_the_last_word():
        return _told(arguments)


def _told(arguments: Sequence[str] | None) -> int:
    """Run the command line and tell what went wrong; returns the exit code."""
    try:
        code = _run(arguments)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as stop:
        _deaf()
        for before in _before(stop) if _launched() else ():  # what was on its way to be told when the signal came
            if isinstance(before, Exception) and (told := _expected(before)) is not None:
                return told
        return _fail("interrupted", 130)
    except BrokenPipeError:  # whoever read the output has gone, as in `posttrain methods list | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        _deaf()
        told = _expected(error)
        if told is not None:
            return told
        if any(isinstance(before, KeyboardInterrupt) for before in _before(error)):  # in the middle of an import
            return _fail("interrupted", 130)
        traceback.print_exc()
        return _fail("this is a fault of posttrain's own; please report it with the lines above", 1)


@contextmanager
def _having_the_last_word() -> Iterator[None]:
    """A launcher sends TERM to its other processes when one has ended; what they have to say of it comes first."""
    if not _launched():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _deaf() -> None:
    """Hear TERM no more, until the command is over."""
    if _launched():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _launched() -> bool:
    """Whether a launcher's signals are for this call: Python hears signals in its main thread."""
    return _several() and threading.current_thread() is threading.main_thread()


def _before(error: BaseException) -> Iterator[BaseException]:
    """The errors during which one was raised, the latest first."""
    while error.__context__ is not None:
        error = error.__context__
        yield error


def _run(arguments: Sequence[str] | None) -> int:
    try:
        typer.main.get_command(app).main(None if arguments is None else list(arguments), prog_name="posttrain")
    except SystemExit as end:
        if end.code == 130:
            raise KeyboardInterrupt from None
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _expected(error: Exception) -> int | None:
    """Tell an error that the user can mend in one line, and return the exit code; None for any other."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        where = f" {error.filename}" if error.filename else ""
        return _fail(f"error: cannot write{where}: {error.strerror}; free some space and try again", 1)
    if "posttrain.trajectory" not in sys.modules:  # where PosttrainError stands; importing it brings torch
        return None
    from posttrain.trajectory import PosttrainError

    if not isinstance(error, PosttrainError):
        return None
    run_module = sys.modules.get("posttrain.run")
    if run_module is not None and isinstance(error, run_module.Interrupted):
        return _fail(str(error), 130)
    return _fail(f"error: {error}", 1)


def _fail(message: str, code: int) -> int:
    from posttrain.terminal import one_line

    who = f"process {os.environ['RANK']}: " if _several() and "RANK" in os.environ else ""
    print(f"posttrain: {who}{one_line(message)}", file=sys.stderr, flush=True)
    return code


def _several() -> bool:
    """Whether a launcher started several processes."""
    return os.environ.get("WORLD_SIZE", "1") not in ("", "1")


if __name__ == "__main__":
    sys.exit(main())
