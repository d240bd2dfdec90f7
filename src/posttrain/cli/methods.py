"""`posttrain methods`: the catalogue."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from posttrain.methods.registry import Entry

app = typer.Typer(help="The catalogue of methods.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_(
    family: Annotated[str | None, typer.Option(help="Only the methods of this family.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As a list of JSON objects.")] = False,
) -> None:
    """List the methods with their families and cards."""
    from posttrain import methods
    from posttrain.reward.names import unknown

    entries = list(methods.registered().values())
    if family is not None:
        families = {entry.family for entry in entries}
        if family not in families:
            raise unknown("family", family, families)
        entries = [entry for entry in entries if entry.family == family]
    if as_json:
        print(json.dumps([_record(entry) for entry in entries], indent=2, ensure_ascii=False))
    else:
        _print_table(entries)


@app.command()
def show(name: Annotated[str, typer.Argument(help="The method's name.", show_default=False)]) -> None:
    """Print what a method is.

    Its definition, arguments with defaults, reference, parts and settings.
    """
    from posttrain import methods

    entry = methods.find(name)
    method = entry.function()
    signature = inspect.signature(entry.function, eval_str=True).replace(return_annotation=inspect.Signature.empty)
    print(f"{entry.name}{signature}\n")
    print(inspect.getdoc(entry.function))
    _print_section("parts", entry.parts)
    default = type(method.settings)()
    settings = method.settings.as_dict().items()
    _print_section("settings", {k: f"{v}" if v == getattr(default, k) else f"{v}  (its own)" for k, v in settings})
    print(f"\nfamily: {entry.family}\ncard: {_cards(entry) or 'none'}\nlearns from: {method.data}")


def _record(entry: Entry) -> dict[str, Any]:
    card = list(entry.card) if isinstance(entry.card, tuple) else entry.card
    return {
        "name": entry.name,
        "family": entry.family,
        "card": card,
        "kind": "online" if entry.function().online else "offline",
        "parts": entry.parts,
        "summary": entry.summary,
    }


def _cards(entry: Entry) -> str:
    return ", ".join(entry.card) if isinstance(entry.card, tuple) else entry.card or ""


def _print_table(entries: list[Entry]) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    table = Table(box=box.SIMPLE_HEAD if console.is_terminal else None, pad_edge=False)
    for heading in ("name", "family", "card"):
        table.add_column(heading, no_wrap=True)
    table.add_column("summary")
    for entry in entries:
        table.add_row(*(Text(cell) for cell in (entry.name, entry.family, _cards(entry), entry.summary)))
    if not console.is_terminal:
        console.width = 240  # a line a method, for grep
    console.print(table)


def _print_section(title: str, rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    print(f"\n{title}:")
    for name, value in rows.items():
        print(f"  {name:<{width}}  {value}")
