"""The page: the parts of a run folder put into `page.html`, with its style, scripts, data and plotly.js inside."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.report import curves, document, results, theme
from posttrain.report.folder import Row, RunFolder, number, read, stage_of, step_of
from posttrain.report.thin import thin_samples

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

CHARACTERS = 20_000_000  # of text in the samples table; with long completions fewer samples fit than `samples`


def build(run: Path, samples: int = 5000) -> Path:
    """Writes `run/report.html` from what the run folder holds, and returns its path.

    At most `samples` samples are kept, evenly spread over the run and with the last step's among them. The file
    appears whole or not at all: an older report stays until the new one is on the disk.
    Raises PosttrainError where `run` holds no readable `run.json`.
    """
    run = Path(run)
    report = run / "report.html"
    document.write(report, render(read(run), samples))
    return report


def render(folder: RunFolder, samples: int = 5000) -> str:
    """The page of a run folder as HTML."""
    figures: dict[str, Figure] = {}
    shown = _samples(folder, samples)
    shown_results, panels = _results(folder, figures), _panels(folder, figures)  # which draw the figures
    return document.render(
        document.file("page.html"),
        [document.file("curves.js"), document.file("table.js")],
        {"curves_data": _curves_data(folder, figures), "samples_data": [_sample(row, folder) for row in shown]},
        sentence=results.headline(folder),
        name=folder.text("name") or folder.path.name,
        status=folder.text("status") or "unknown",
        facts=_facts(folder),
        stages=[(stage, theme.stage_colour(at)) for at, stage in enumerate(folder.stages)],
        sizes=any(stage.size for stage in folder.stages),
        notes=[str(note) for note in _list(folder.run.get("notes"))],
        problems=folder.problems,
        missing=[name for name in ("metrics", "samples", "evaluations") if getattr(folder, name) is None],
        results=shown_results,
        comparisons=results.comparisons(folder),
        panels=panels,
        axes=curves.axes(folder.metrics or []),
        points=curves.POINTS if len(folder.metrics or []) > curves.POINTS else None,
        samples=shown,
        samples_left_out=len(folder.samples or []) - len(shown),
        recipe=folder.recipe,
        versions={str(name): str(version) for name, version in _mapping(folder.run.get("versions")).items()},
    )


def _facts(folder: RunFolder) -> list[tuple[str, str]]:
    """What was run, as pairs of a term and its value; what `run.json` does not say is left away."""
    facts = [(key, folder.text(key)) for key in ("model", "task", "device", "seed", "command")]
    facts[3:3] = [("started", folder.text("created").replace("T", " ")), ("took", results.duration(folder))]
    if folder.metrics and folder.text("status") != "finished":
        last = folder.metrics[-1]
        labels = {stage.index: stage.label for stage in folder.stages}
        label = labels.get(stage_of(last), str(last.get("name") or ""))
        facts.append(("last step", f"{label} {step_of(last)}".strip()))
    return [(term, value) for term, value in facts if value]


def _results(folder: RunFolder, figures: dict[str, Figure]) -> list[dict[str, Any]]:
    """The evaluations of each task, with the name of their figure."""
    positions = {stage.index: at for at, stage in enumerate(folder.stages)}
    found = results.evaluations(folder)
    tasks = []
    for at, task in enumerate(dict.fromkeys(row.task for row in found)):
        rows = [row for row in found if row.task == task]
        figures[f"result-{at}"] = results.before_after(rows, positions)
        said = "; ".join(f"{row.label} {row.accuracy}" for row in rows)
        tasks.append({"task": task, "rows": rows, "figure": f"result-{at}", "summary": f"Accuracy: {said}"})
    return tasks


def _panels(folder: RunFolder, figures: dict[str, Figure]) -> list[tuple[str, curves.Panel]]:
    """The panels of the curves, each with the name of its figure."""
    found = []
    for at, panel in enumerate(curves.panels(folder.metrics or [], folder.stages)):
        if panel.figure is not None:
            figures[f"curve-{at}"] = panel.figure
        found.append((f"curve-{at}", panel))
    return found


def _curves_data(folder: RunFolder, figures: Mapping[str, Figure]) -> dict[str, Any]:
    return {
        "axes": {axis.key: {"title": axis.title, "values": axis.values} for axis in curves.axes(folder.metrics or [])},
        "figures": {name: figure.to_plotly_json() for name, figure in figures.items()},
    }


def _samples(folder: RunFolder, limit: int) -> list[Row]:
    """The samples to show: at most `limit`, and fewer where they are so long that the page would grow too large."""
    found = folder.samples or []
    characters = sum(len(str(row.get(key) or "")) for row in found for key in ("prompt", "completion", "answer"))
    if characters > CHARACTERS:
        limit = min(limit, max(1, CHARACTERS * len(found) // characters))
    return thin_samples(found, limit)


def _sample(row: Row, folder: RunFolder) -> Row:
    """A sample as the table shows it: numbers as they are, everything else as text."""
    labels = {stage.index: stage.label for stage in folder.stages}
    rewards = {key: number(value) for key, value in _mapping(row.get("rewards")).items()}
    return {
        "step": step_of(row),
        "stage": labels.get(stage_of(row), str(row.get("name") or "")),
        "split": _words(row.get("split")),
        "reward": number(row.get("reward")),
        "rewards": rewards if len(rewards) > 1 else {},
        "finish": _words(row.get("finish")),
        "prompt": _words(row.get("prompt")),
        "completion": _words(row.get("completion")),
        "answer": _words(row.get("answer")),
    }


def _words(value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    return json.dumps(value, ensure_ascii=False, indent=1) if isinstance(value, dict | list) else str(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []
