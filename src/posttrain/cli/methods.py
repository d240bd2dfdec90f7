"""`posttrain methods`: the catalogue."""

from __future__ import annotations

import inspect
import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from posttrain.methods.registry import Entry
    from posttrain.methods.verdicts import Verdict
    from posttrain.training.method import Method

app = typer.Typer(help="The catalogue of methods.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_(
    family: Annotated[str | None, typer.Option(help="Only the methods of this family.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As a list of JSON objects.")] = False,
    tree: Annotated[bool, typer.Option("--tree", help="By the branches of the taxonomy, with the empty ones.")] = False,
    gaps: Annotated[bool, typer.Option("--gaps", help="Only the branches without a method.")] = False,
) -> None:
    """List the methods with their families, cards and verdicts.

    A card is a paper's number; a verdict says whether the paper's claim held in our study of it.
    """
    from posttrain import methods
    from posttrain.cli.table import print_table
    from posttrain.methods.taxonomy import taxonomy
    from posttrain.reward.names import unknown
    from posttrain.trajectory import PosttrainError

    if as_json + tree + gaps > 1:
        raise PosttrainError("--json, --tree and --gaps are three ways to list; give one of them")
    entries = list(methods.registered().values())
    if family is not None:
        families = {entry.family for entry in entries} | set(taxonomy().home)
        if family not in families:
            raise unknown("family", family, families)
        entries = [entry for entry in entries if entry.family == family]
    if as_json:
        print(json.dumps([_record(entry) for entry in entries], indent=2, ensure_ascii=False))
    elif tree or gaps:
        from posttrain.cli import taxonomy_tree

        (taxonomy_tree.print_gaps if gaps else taxonomy_tree.print_tree)(entries, family)
    else:
        rows = [(e.name, e.family, ", ".join(e.cards), e.verdict, e.summary) for e in entries]
        print_table(("name", "family", "card", "verdict", "summary"), rows)


@app.command()
def show(name: Annotated[str, typer.Argument(help="The method's name.", show_default=False)]) -> None:
    """Print what a method is.

    Its definition, arguments with defaults, reference, parts and settings; and what the studies of it found.
    """
    from posttrain import methods
    from posttrain.methods.taxonomy import taxonomy

    entry = methods.find(name)
    signature = inspect.signature(entry.function, eval_str=True).replace(return_annotation=inspect.Signature.empty)
    print(f"{entry.name}{signature}\n")
    print(inspect.getdoc(entry.function))
    for i, stage in enumerate(entry.stages):
        _print_stage(stage, "" if entry.kind != "pipeline" else f"stage {i + 1}, {stage.name}: ")
    if entry.kind == "compression":
        _print_section("parts", entry.parts)
    branch = taxonomy().branches[entry.branch] if entry.branch is not None else None
    print(f"\nfamily: {entry.family}\ncard: {', '.join(entry.cards) or 'none'}")
    print(f"branch: {f'{branch.id} {branch.name}' if branch is not None else 'none'}")
    print(f"kind: {entry.kind}")
    if entry.stages:
        print(f"learns from: {', then '.join(stage.data for stage in entry.stages)}")
    print(f"verdict: {entry.verdict}{'' if entry.studies else ' (no study of it has been run)'}")
    for study in entry.studies:
        _print_study(study)


def _record(entry: Entry) -> dict[str, Any]:
    return {
        "name": entry.name,
        "family": entry.family,
        "card": list(entry.card) if isinstance(entry.card, tuple) else entry.card,
        "kind": entry.kind,
        "parts": entry.parts,
        "verdict": entry.verdict,
        "summary": entry.summary,
        "branch": entry.branch,
    }


def _print_stage(stage: Method, label: str) -> None:
    from posttrain.methods.parts import parts_of

    parts = parts_of(stage)
    terms = parts.pop("terms", [])
    for term in terms:
        _print_section(f"{label}parts on sequences from {term.pop('sources')}", term)
    if parts:
        _print_section(f"{label}{'beside them' if terms else 'parts'}", parts)
    default = type(stage.settings)()
    settings = stage.settings.as_dict().items()
    shown = {k: f"{v}" if v == getattr(default, k) else f"{v}  (its own)" for k, v in settings}
    _print_section(f"{label}settings", shown)


def _print_study(study: Verdict) -> None:
    rows = {
        "claim": study.claim,
        "card": ", ".join(study.cards) or "none",
        "verdict": study.verdict,
        "figures": study.effect or "none",
        "seeds": "not told" if study.seeds is None else f"{study.seeds}",
        "date": study.date or "not told",
    }
    _print_section(f"study {study.study}", rows)


def _print_section(title: str, rows: dict[str, str]) -> None:
    width = max(map(len, rows))
    print(f"\n{title}:")
    for name, value in rows.items():
        print(f"  {name:<{width}}  {value}")
