"""The page of a comparison: the sentence, accuracies with intervals, and curves over time, tokens and rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from posttrain.report import curves, document, results, theme
from posttrain.studies.comparison import HEADINGS, RULE, Comparison, p_in_words, points
from posttrain.studies.pictures import together
from posttrain.studies.study import Curve
from posttrain.training.checkpoint import write_text

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

AXES = (("seconds", "minutes"), ("tokens", "tokens"), ("rollouts", "rollouts"), ("step", "step"))
TITLES = {"accuracy": "Held-out accuracy", "reward": curves.TITLES["reward"], "length": curves.TITLES["length"],
          "entropy": curves.TITLES["entropy"]}  # fmt: skip
SHARES = ("accuracy",)


def write(found: Comparison) -> None:
    """`comparison.json` and `compare.html` in the comparison's folder."""
    write_text(found.folder / "comparison.json", found.to_json())
    document.write(found.page, render(found))


def render(found: Comparison) -> str:
    """The page as HTML."""
    places = _Places()
    figures = {"result-0": _accuracies(found)}
    panels = []
    for at, name in enumerate(name for name in TITLES if any(_curves(found, m.name, name) for m in found.methods)):
        figures[f"curve-{at}"] = _figure(found, name, places)
        panels.append((f"curve-{at}", TITLES[name]))
    data = {"axes": places.axes(), "figures": {name: figure.to_plotly_json() for name, figure in figures.items()}}
    template = resources.files("posttrain.studies").joinpath("compare.html").read_text(encoding="utf-8")
    return document.render(
        template,
        [document.file("curves.js")],
        {"curves_data": data},
        title=f"{', '.join(m.name for m in found.methods)} on {found.task}",
        sentence=found.sentence,
        remarks=found.remarks,
        rule=RULE,
        facts=_facts(found),
        methods=[(m, theme.stage_colour(at)) for at, m in enumerate(found.methods)],
        headings=(*HEADINGS[:2], f"minus {found.methods[0].name}", *HEADINGS[3:]),
        rows=found.rows(),
        differences=[
            (f"{d.method} minus {d.other}", points(d.difference, d.low, d.high), p_in_words(d.pvalue), d.real)
            for d in found.differences
        ],
        axes=[(key, title) for key, title in AXES if key in data["axes"]],
        panels=panels,
    )


class _Places:
    """Where every point of every curve lies, by the number that the page's script knows it by."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float | None]] = []

    def add(self, runs: Sequence[Curve]) -> list[int]:
        """The points of a method's mean curve: what had been spent by then, as a mean over its seeds."""
        steps, _ = together(runs)
        spent = {key: together(runs, key)[1].mean(0) for key, _ in AXES[:3]}
        sampled = bool(spent["rollouts"].any())
        first = len(self.rows)
        for i, step in enumerate(steps):
            row: dict[str, float | None] = {"step": float(step), **{key: float(spent[key][i]) for key in spent}}
            row["seconds"] = float(spent["seconds"][i]) / 60
            self.rows.append(row if sampled else {**row, "rollouts": None})
        return list(range(first, len(self.rows)))

    def axes(self) -> dict[str, Any]:
        """As the script wants them; an axis along which nothing lies is left away."""
        found = {key: {"title": title, "values": [row[key] for row in self.rows]} for key, title in AXES}
        return {key: axis for key, axis in found.items() if any(value is not None for value in axis["values"])}


def _curves(found: Comparison, method: str, name: str) -> list[Curve]:
    return [run.curves[name] for run in found.runs[method] if run.curves.get(name)]


def _figure(found: Comparison, name: str, places: _Places) -> Figure:
    """A line a method, the mean over its seeds, in the band from the lowest seed to the highest."""
    import plotly.graph_objects as go

    figure, share = go.Figure(), name in SHARES
    for at, method in enumerate(found.methods):
        runs = _curves(found, method.name, name)
        if not runs:
            continue
        _, values = together(runs)
        rows, colour, label = places.add(runs), theme.stage_colour(at), theme.label(method.name)
        minutes = [places.rows[row]["seconds"] for row in rows]
        common: dict[str, Any] = {"x": minutes, "customdata": rows, "meta": at}
        if len(runs) > 1:
            edge = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", **common}
            figure.add_scatter(y=values.min(0).tolist(), **edge)
            figure.add_scatter(y=values.max(0).tolist(), fill="tonexty", fillcolor=_pale(colour), **edge)
        figure.add_scatter(
            y=values.mean(0).tolist(),
            name=label,
            mode="lines+markers" if len(rows) <= 12 else "lines",
            line={"color": colour, "width": 2},
            marker={"color": colour, "size": 5},
            hovertemplate=f"%{{y:{'.1%' if share else '.4~g'}}}<extra>{label}</extra>",
            **common,
        )
    figure.update_layout(
        theme.layout(
            height=240,
            xaxis=theme.axis(title={"text": AXES[0][1], "standoff": 6}, showgrid=False, zeroline=False, nticks=6),
            yaxis=theme.axis(nticks=5, rangemode="tozero" if share else "normal", tickformat=".0%" if share else ""),
        )
    )
    return figure


def _accuracies(found: Comparison) -> Figure:
    """Bars with intervals: the model as it was, then every method."""

    def bar(label: str, at: int, estimate: Any) -> results.Evaluation:
        value = results.Interval(estimate.value, estimate.low, estimate.high)
        return results.Evaluation(label, found.task, at, 0, found.prompts, None, None, None, {"accuracy": value})

    bars = [bar("before", -1, found.before), *(bar(m.name, at, m.accuracy) for at, m in enumerate(found.methods))]
    return results.before_after(bars, {at: at for at in range(len(found.methods))})


def _facts(found: Comparison) -> list[tuple[str, str]]:
    return [
        ("model", found.model),
        ("task", found.task),
        ("budget", f"{found.budget} for each method and seed"),
        ("seeds", str(found.seeds)),
        ("held-out problems", str(found.prompts)),
    ]


def _pale(colour: str) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.16)"
