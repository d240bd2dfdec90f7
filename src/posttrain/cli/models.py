"""`posttrain models`: the models that come by name."""

from __future__ import annotations

from typing import Annotated

import typer

app = typer.Typer(help="The models that come by name.", rich_markup_mode=None)


@app.callback(invoke_without_command=True)
def list_(context: typer.Context) -> None:
    """List the models that come by name, whether they are here and where."""
    if context.invoked_subcommand is not None:
        return
    from posttrain.models.load import BUNDLED, cache_folder

    for name, (_, description) in BUNDLED.items():
        folder = cache_folder() / name
        here = (folder / "config.json").is_file()
        print(f"{name}: {description}")
        print(f"  cached in {folder}" if here else f"  not fetched yet: posttrain models pull {name}")


@app.command()
def pull(name: Annotated[str, typer.Argument(help="A name that posttrain models lists.", show_default=False)]) -> None:
    """Fetch a model now.

    Prints the folder it is in.
    """
    from posttrain.models.load import BUNDLED, bundled_folder
    from posttrain.reward.names import unknown

    if name not in BUNDLED:
        raise unknown("bundled model", name, BUNDLED)
    print(bundled_folder(name))
