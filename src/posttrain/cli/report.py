"""`posttrain report`: build a run's report again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run folder, finished or not.", show_default=False)],
    open_: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
) -> None:
    """Build a run's report again.

    Writes report.html from what the run folder holds, and prints its path.
    """
    from posttrain.report import build

    page = build(folder)
    print(page)
    if open_:
        import webbrowser

        webbrowser.open(page.resolve().as_uri())
