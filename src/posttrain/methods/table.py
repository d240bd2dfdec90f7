r"""The tables of the documentation that are made from the catalogue, never by hand.

`python -m posttrain.methods.table` fills them in anew, in every Markdown file of `docs/` (or of those it is given) that
has a place for one: the lines between `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import pkgutil
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

from posttrain.compress import packed
from posttrain.compress.method import Compression
from posttrain.compress.packed.weight import FORMATS
from posttrain.compress.solvers.solver import Solver
from posttrain.methods import registered
from posttrain.methods.parts import default_of, fields_beside, objectives_of, parts_of, written
from posttrain.methods.registry import Entry
from posttrain.methods.verdicts import Verdict, verdicts
from posttrain.objective.mixture import Mixture
from posttrain.training.method import OBJECTIVE_PARTS, Method
from posttrain.trajectory import PosttrainError

PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)
HEADINGS = ("method", "card", "advantage", "denominator", "mask", "aggregation", "divergence", "beside the objective")


# -- every method by its parts ---------------------------------------------------------------------------------------


def methods_table(entries: Iterable[Entry] | None = None) -> str:
    """A table a family: a row a method, a row a term where its objective is a mixture, a row a stage of a pipeline."""
    found = [e for e in (registered().values() if entries is None else entries) if e.kind != "compression"]
    sections = []
    for family, members in groupby(found, key=lambda entry: entry.family):
        rows = [row for entry in members for row in _rows(entry)]
        used = [i for i in range(len(HEADINGS)) if i < 2 or any(row[i] for row in rows)]
        shown = [[row[i] for i in used] for row in rows]
        sections.append(f"### {family}\n\n{_markdown([HEADINGS[i] for i in used], shown)}")
    return "\n\n".join(sections)


def _rows(entry: Entry) -> Iterator[list[str]]:
    parts = parts_of(entry.function(), brief=True)
    stages = [(f"stage {i + 1}: {stage['method']}", stage) for i, stage in enumerate(parts.get("stages", ()))]
    name = f"**{entry.name}**"
    for label, stage in stages or [("", parts)]:
        beside = [f"{key} {_code(value)}" for key, value in stage.items() if key in fields_beside()]
        for term in stage.get("terms", [stage]):
            told = "<br>".join(filter(None, [name, label, _where(term)]))
            yield [told, ", ".join(entry.cards) if name else "", *_cells(term), "<br>".join(beside)]
            name, label, beside = "", "", []


def _where(term: dict[str, str]) -> str:
    """Which sequences a term of a mixture is for, and its weight if that is not 1."""
    times = f", times {_code(term['weight'])}" if term.get("weight", "1.0") != "1.0" else ""
    return f"on {term['sources']}{times}" if "sources" in term else ""


def _cells(parts: dict[str, str]) -> list[str]:
    return ["" if parts[part] == "none" else _code(parts[part]) for part in OBJECTIVE_PARTS]


# -- what the parts are ----------------------------------------------------------------------------------------------

KINDS = {"advantage": "advantage", "loss": "pair loss", "denominator": "denominator", "masks": "mask",
         "aggregate": "aggregation", "divergences": "divergence", "weight": "schedule"}  # fmt: skip


def parts_table(entries: Iterable[Entry] | None = None) -> str:
    """Every part that a method of the catalogue uses, with the first paragraph of its documentation."""
    found: dict[str, dict[str, type]] = {place: {} for place in (*KINDS, *fields_beside())}
    for entry in registered().values() if entries is None else entries:
        for method in entry.stages:
            for place, part in _placed(method):
                for at, made in _classes(place, part):
                    found[at][made.__name__] = made
    rows = [
        [KINDS.get(place, place) if i == 0 else "", f"`{name}`", explained(made)]
        for place, classes in found.items()
        for i, (name, made) in enumerate(sorted(classes.items()))
    ]
    return _markdown(["part", "name", "what it is"], rows)


def _placed(method: Method) -> Iterator[tuple[str, object]]:
    """Every part of a method, with the name of the field that it stands in."""
    for objective in objectives_of(method):
        yield from ((part, getattr(objective, part)) for part in OBJECTIVE_PARTS)
    if isinstance(method.objective, Mixture):
        yield "weight", tuple(term.weight for term in method.objective.terms)
        own = [f.name for f in dataclasses.fields(method.objective) if f.name != "terms"]
        yield "weight", tuple(getattr(method.objective, name) for name in own)
    yield from ((name, getattr(method, name)) for name in fields_beside())


def _classes(place: str, part: object) -> Iterator[tuple[str, type]]:
    """The documented classes of ours in a part, with their places: its own, and those of the parts it is made of."""
    if isinstance(part, tuple):
        for each in part:
            yield from _classes(place, each)
    elif isinstance(part, functools.partial):
        yield from _classes(place, (part.func, *part.args, *part.keywords.values()))
    elif isinstance(part, type):
        yield place, part
    elif type(part).__module__.startswith("posttrain.") and dataclasses.is_dataclass(part):
        yield ("weight" if type(part).__module__.endswith(".schedule") else place), type(part)
        for field in dataclasses.fields(part):
            yield from _classes(field.name if field.name in ("loss", "grid") else place, getattr(part, field.name))


# -- compression -----------------------------------------------------------------------------------------------------

COMPRESSION = ("method", "card", "transforms", "allocation", "solver", "grid", "activations", "attention")


def compression_table(entries: Iterable[Entry] | None = None) -> str:
    """A row a compression method: what it does first, who picks the codes, and on which values."""
    rows = []
    for entry in registered().values() if entries is None else entries:
        made = entry.function()
        if isinstance(made, Compression):
            solver, grid = _apart(made.solver)
            held = (made.transforms, made.allocation, solver, grid, made.activations, made.attention)
            parts = [_code(written(part, brief=True)) if part else "" for part in held]
            rows.append([f"**{entry.name}**", ", ".join(entry.cards), *parts])
    used = [i for i in range(len(COMPRESSION)) if i < 2 or any(row[i] for row in rows)]
    return _markdown([COMPRESSION[i] for i in used], [[row[i] for i in used] for row in rows])


def _apart(solver: Solver) -> tuple[Solver, object]:
    """A solver and its grid; the grid has a column of its own."""
    field = next((f for f in dataclasses.fields(solver) if f.name == "grid"), None)
    default = default_of(field) if field is not None else dataclasses.MISSING
    if default is dataclasses.MISSING:
        return solver, None
    held = {"grid": default}
    return dataclasses.replace(solver, **held), vars(solver)["grid"]


def compression_parts_table(entries: Iterable[Entry] | None = None) -> str:
    """Every part that a compression method uses, and every format that weights are stored in."""
    found: dict[str, dict[str, type]] = {kind: {} for kind in COMPRESSION[2:]}
    for entry in registered().values() if entries is None else entries:
        made = entry.function()
        if isinstance(made, Compression):
            for place in ("transforms", "allocation", "solver", "activations", "attention"):
                for at, kind in _classes(place, getattr(made, place)):
                    found[at][kind.__name__] = kind
    for module in pkgutil.iter_modules(packed.__path__, f"{packed.__name__}."):  # which makes every format known
        import_module(module.name)
    found["stored as"] = {made.__name__: made for made in FORMATS.values() if made.__module__.startswith("posttrain.")}
    rows = [
        [place if i == 0 else "", f"`{name}`", explained(made)]
        for place, classes in found.items()
        for i, (name, made) in enumerate(sorted(classes.items()))
    ]
    return _markdown(["part", "name", "what it is"], rows)


# -- what a class says of itself -------------------------------------------------------------------------------------


def explained(made: type) -> str:
    """The first paragraph of a class's documentation, with the equation that it leads to, as Markdown on one line."""
    paragraphs = (inspect.getdoc(made) or "").split("\n\n")
    first = " ".join(paragraphs[0].split())
    if first.endswith(":") and len(paragraphs) > 1 and paragraphs[1].startswith(".. math::"):
        first += f" :math:`{' '.join(paragraphs[1].removeprefix('.. math::').split())}`"
    text = re.sub(r":math:`([^`]*)`", lambda math: f"${math[1]}$".replace("|", r"\vert "), first)
    return text.replace("``", "`").rstrip(":.")


# -- what the studies found ------------------------------------------------------------------------------------------


def results_table(found: Sequence[Verdict] | None = None) -> str:
    """A row a study, those of one method together."""
    found = verdicts() if found is None else found
    if not found:
        return "No study has been run yet."
    rows = [
        [", ".join(v.methods), ", ".join(v.cards), v.claim, f"**{v.verdict}**", v.effect, f"{v.seeds or ''}"]
        for v in sorted(found, key=lambda v: (v.methods, v.study))
    ]
    return _markdown(["method", "card", "claim", "verdict", "what was measured", "seeds"], rows)


# -- filling them in -------------------------------------------------------------------------------------------------

TABLES: dict[str, Callable[[], str]] = {
    "methods": methods_table,
    "parts": parts_table,
    "compression": compression_table,
    "compression-parts": compression_parts_table,
    "results": results_table,
}


def filled(text: str, origin: str = "the text") -> str:
    """A document with every table in it made anew."""

    def made(place: re.Match[str]) -> str:
        if place[2] not in TABLES:
            raise PosttrainError(f"{origin} has a place for a table {place[2]!r}; expected one of {', '.join(TABLES)}")
        return f"{place[1]}\n{TABLES[place[2]]()}\n\n{place[3]}"

    return PLACE.sub(made, text)


def documents() -> list[Path]:
    """The pages of the source checkout that have a place for a table."""
    folder = Path(__file__).parents[3] / "docs"
    if not folder.is_dir():
        raise PosttrainError(f"no documentation at {folder}; run it in a source checkout, or name the files")
    return [page for page in sorted(folder.glob("*.md")) if PLACE.search(page.read_text(encoding="utf-8"))]


def main(arguments: Sequence[str]) -> None:
    for page in [Path(a) for a in arguments] or documents():
        before = page.read_text(encoding="utf-8")
        after = filled(before, str(page))
        if after != before:
            page.write_text(after, encoding="utf-8")
        print(f"{page}: {'written' if after != before else 'as it should be'}")


def _code(text: Any) -> str:
    return f"`{text}`"


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


if __name__ == "__main__":
    main(sys.argv[1:])
