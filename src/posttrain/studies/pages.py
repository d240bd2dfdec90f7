"""Writing a study's outcome down: JSON, picture and page, the index of all pages, and the verdicts of the package."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.models.load import cache_folder
from posttrain.studies.fingerprint import digest
from posttrain.studies.pictures import draw
from posttrain.studies.results import Result, interval, number
from posttrain.studies.verdict import RULE
from posttrain.training.checkpoint import write_text
from posttrain.trajectory import PosttrainError

INDEX = "README.md"
VERDICTS = Path(__file__).with_name("verdicts.json")
Row = dict[str, Any]


def docs_folder() -> Path | None:
    """`docs/studies` of the source checkout that this package runs from; None where it is installed without one."""
    root = Path(__file__).resolve().parents[3]
    there = (root / "pyproject.toml").is_file() and (root / "src" / "posttrain" / "studies").is_dir()
    return root / "docs" / "studies" if there else None


def write(result: Result, folder: Path) -> Path:
    """Write a study's JSON, picture and page into `folder` and bring the index there up to date; returns the page.

    In the checkout's own folder the verdicts that the package ships follow too, and a quick result is refused.
    """
    ours = docs_folder()
    is_ours = ours is not None and folder.resolve() == ours.resolve()
    if is_ours and result.quick:
        raise PosttrainError(f"a --quick run proves nothing and is not written to {folder}; give another --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder):
            write_text(folder / f"{result.study}.svg", draw(result))
            write_text(folder / f"{result.study}.md", page(result))
            write_text(folder / f"{result.study}.json", result.to_json())
            rows = read(folder)
            write_text(folder / INDEX, index(rows))
            if is_ours:
                write_text(VERDICTS, json.dumps(verdicts(rows), indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise PosttrainError(f"cannot write to {folder}: {error.strerror or error}; give another --output") from error
    return folder / f"{result.study}.md"


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time: studies that run side by side all write the index. The lock lies outside of the folder."""
    from filelock import FileLock

    locks = cache_folder() / "studies" / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    with FileLock(str(locks / digest(folder.resolve()))):
        yield


def read(folder: Path) -> list[Row]:
    """The results in a folder, by family and name."""
    rows = []
    for file in folder.glob("*.json"):
        try:
            row = json.loads(file.read_text(encoding="utf-8"))
            rows.append((row["family"], row["study"], row))
        except (ValueError, KeyError, TypeError) as error:
            raise PosttrainError(f"{file} is no study's result ({error}); move it elsewhere") from error
    return [row for _, _, row in sorted(rows, key=lambda found: found[:2])]


def verdicts(rows: Iterable[Row]) -> dict[str, Row]:
    """What an installed package tells of the studies, by name."""
    kept = ("methods", "card", "claim", "verdict", "effect", "seeds", "date")
    return {row["study"]: {key: row[key] for key in kept} for row in sorted(rows, key=lambda row: row["study"])}


def page(result: Result) -> str:
    """A study's page in Markdown."""
    speed = "" if result.rollouts_per_second is None else f", {number(result.rollouts_per_second)} rollouts a second"
    card = f"; card {', '.join(result.card)}" if result.card else ""
    parts = [
        f"# {result.study}",
        f"**Claim.** {result.claim}",
        f"**Paper.** {result.paper} (methods: {', '.join(result.methods)}{card})",
        f"**Verdict: {result.verdict}.** " + ("This was a quick run, which proves nothing." if result.quick else ""),
        _findings(result),
        f"![The figures of every arm, seed by seed]({result.study}.svg)",
        "## Why",
        result.text,
        "## What was run",
        result.setting,
        f"{result.seeds} seed{'s' if result.seeds != 1 else ''} an arm; means with 95 % t-intervals over the seeds:",
        _figures(result, result.named),
        f"{number(result.seconds)} seconds of training in all{speed}, on {result.machine}, {result.date}; "
        + ", ".join(f"{name} {found}" for name, found in result.versions.items())
        + ".",
        _folded("All other figures", _figures(result, result.others)) if result.others else "",
        "## The rule",
        RULE,
        f"## Notes\n\n{result.notes}" if result.notes else "",
        f"To run it again: `posttrain study {result.study} --fresh`.",
    ]
    return "\n\n".join(part.strip() for part in parts if part.strip()) + "\n"


def index(rows: Sequence[Row]) -> str:
    """The table of all studies in Markdown."""
    counts = {verdict: sum(row["verdict"] == verdict for row in rows) for verdict in ("holds", "fails", "unclear")}
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    lines = _table(
        ("study", "paper", "claim", "what was run", "effect with 95 % interval", "verdict"),
        (
            (f"[{row['study']}]({row['study']}.md)", row["paper"], row["claim"],
             f"{row['setting']} {row['seeds']} seeds.", row["effect"], row["verdict"])
            for row in rows
        ),
    )  # fmt: skip
    return (
        "# Studies\n\n"
        "Each study runs one claim of a paper as a controlled experiment, at a size that a small machine can carry. "
        "What is expected, the sizes and the rule were written down before the run; a claim that fails here is "
        "reported as failing, and may still hold at the paper's own scale.\n\n"
        f"{RULE}\n\n"
        f"{len(rows)} studies: {said}. `make studies` runs them all.\n\n{lines}\n"
    )


def _findings(result: Result) -> str:
    return _table(
        ("expected", "effect with 95 % interval", "p", "verdict", "why"),
        (
            (f.expectation, interval(f.effect, f.low, f.high, signed=True), number(f.pvalue), f.verdict, f.why)
            for f in result.expectations
        ),
    )


def _figures(result: Result, metrics: Sequence[str]) -> str:
    def cell(arm: str, metric: str) -> str:
        figure = result.arms[arm].figures.get(metric)
        if figure is None:
            return ""
        seeds = ", ".join(map(number, figure.values)) if len(figure.values) > 1 else ""
        return interval(figure.mean, figure.low, figure.high) + (f" ({seeds})" if seeds else "")

    return _table(("arm", *metrics), ((arm, *(cell(arm, metric) for metric in metrics)) for arm in result.arms))


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(" ".join(c.replace("|", "\\|").split()) for c in line) + " |" for line in lines)


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"
