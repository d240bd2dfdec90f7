"""The page of sensitivity to decoding: heat maps of what each setting costs each model, curves, and the tables."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.evaluation.decoding import DecodingSensitivity, signed
from posttrain.report import document, theme

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

NAMED = 2  # settings that a sentence names; more are counted
DIVERGING = ((0.0, "#c9596a"), (0.5, "rgba(138, 146, 156, 0.15)"), (1.0, "#3f7fc1"))  # worse, alike, better
RISING = ((0.0, "rgba(138, 146, 156, 0.15)"), (1.0, "#d9772b"))


def write(found: DecodingSensitivity, path: Path) -> None:
    """The page as one HTML file."""
    document.write(path, render(found))


def render(found: DecodingSensitivity) -> str:
    figures: dict[str, Any] = {f"result-axis-{axis}": _curve(found, axis) for axis, _ in found.grid.axes}
    if found.shifts:
        figures["result-gain"] = _gain(found)
        figures["result-variation"] = _variation(found)
    return document.render(
        document.file("decoding.html"),
        [document.file("curves.js")],
        {"curves_data": {"axes": {}, "figures": {name: figure.to_plotly_json() for name, figure in figures.items()}}},
        title=f"{', '.join(found.models)} on {found.task}",
        sentence=sentence(found),
        reference=found.reference,
        axes=[axis for axis, _ in found.grid.axes],
        compared=bool(found.shifts),
        facts=_facts(found),
        tables=[found.accuracy_rows(), found.sensitivity_rows()] + ([found.shift_rows()] if found.shifts else []),
    )


def sentence(found: DecodingSensitivity) -> str:
    """What the grid says, in words: which model takes more to an axis than the reference, and where they are apart."""
    others = [model for model in found.models if model != found.reference]
    if not others:
        axis = found.grid.axes[0][0]
        return f"Along {axis}, the accuracy of {found.reference} varies by {found.sensitivity(found.reference, axis)}"
    told = []
    for model in others:
        for axis, _ in found.grid.axes:
            excess = found.excess(model, axis)
            if excess.low > 0 or excess.high < 0:
                more = "more" if excess.low > 0 else "less"
                told.append(f"{model} takes {more} to {axis} than {found.reference} ({signed(excess)} points)")
        if apart := found.apart(model):
            where = (
                ", ".join(map(str, apart))
                if len(apart) <= NAMED
                else f"{len(apart)} of {len(found.grid.settings)} settings"
            )
            told.append(f"{model} is apart from {found.reference} at {where}")
    names = " and ".join(others)
    return "; ".join(told) or f"No setting tells {names} from {found.reference} beyond the noise"


def _facts(found: DecodingSensitivity) -> list[tuple[str, str]]:
    base, problems = found.grid.base, found.right[found.reference].shape[1]
    held = f"temperature {base.temperature:g}, top_k {base.top_k}, top_p {base.top_p:g}, min_p {base.min_p:g}"
    return [
        ("task", f"{found.task}, {problems} held-out problem{'s' if problems != 1 else ''}"),
        ("samples", f"{found.samples} a problem, of the same random numbers for every model and setting"),
        ("where an axis does not move", f"{held}, at most {base.max_tokens} tokens"),
        ("tokens a second", ", ".join(f"{model} {rate:.3g}" for model, rate in found.rate.items())),
    ]


def _curve(found: DecodingSensitivity, axis: str) -> Figure:
    """Accuracy along an axis, a line a model."""
    import plotly.graph_objects as go

    figure, places = go.Figure(), found.grid.places(axis)
    values = [found.grid.settings[i].value for i in places]
    for at, model in enumerate(found.models):
        held = [found.accuracy[model][i] for i in places]
        colour = theme.stage_colour(at - 1)  # the reference is grey
        figure.add_scatter(
            x=values, y=[e.value for e in held], mode="lines+markers", name=theme.label(model),
            line={"color": colour, "width": 2}, marker={"size": 6},
            error_y={
                "type": "data", "symmetric": False, "array": [_or_zero(e.high - e.value) for e in held],
                "arrayminus": [_or_zero(e.value - e.low) for e in held], "color": colour, "width": 3, "thickness": 1,
            },
            hovertemplate=f"%{{y:.1%}} at {axis} %{{x:g}}<extra>{theme.label(model)}</extra>",
        )  # fmt: skip
    figure.update_layout(
        theme.layout(
            height=280,
            showlegend=len(found.models) > 1,
            legend={"font": {"color": theme.NEUTRAL}},
            xaxis=theme.axis(title={"text": axis, "standoff": 6}, zeroline=False),
            yaxis=theme.axis(title={"text": "accuracy", "standoff": 6}, tickformat=".0%", rangemode="tozero"),
        )
    )
    return figure


def _or_zero(width: float) -> float:
    return width if math.isfinite(width) else 0.0


def _gain(found: DecodingSensitivity) -> Figure:
    """Accuracy less the reference's, in points: a row a model, a column a setting."""
    before = found.right[found.reference].mean(1)
    gains = {model: (100 * (found.right[model].mean(1) - before)).tolist() for model in found.shifts}
    most = max(1.0, *(abs(v) for row in gains.values() for v in row))
    return _heat(found, gains, "%{z:+.1f}", DIVERGING, (-most, most), "points")


def _variation(found: DecodingSensitivity) -> Figure:
    """Total variation from the reference's next-token distribution: a row a model, a column a setting."""
    rows = {model: [shift.variation for shift in shifts] for model, shifts in found.shifts.items()}
    return _heat(found, rows, "%{z:.3f}", RISING, (0.0, max(1e-9, *(v for row in rows.values() for v in row))), "")


def _heat(
    found: DecodingSensitivity, rows: dict[str, list[float]], text: str, colours: tuple[tuple[float, str], ...],
    ends: tuple[float, float], unit: str,
) -> Figure:  # fmt: skip
    import plotly.graph_objects as go

    figure = go.Figure()
    figure.add_heatmap(
        z=list(rows.values()), x=[str(setting) for setting in found.grid.settings], y=[theme.label(m) for m in rows],
        colorscale=[list(pair) for pair in colours], zmin=ends[0], zmax=ends[1], showscale=False, xgap=2, ygap=2,
        texttemplate=text, hovertemplate=f"%{{y}} at %{{x}}: {text} {unit}<extra></extra>",
    )  # fmt: skip
    figure.update_layout(
        theme.layout(
            height=90 + 34 * len(rows),
            xaxis=theme.axis(type="category", showgrid=False),
            yaxis=theme.axis(type="category", showgrid=False, autorange="reversed"),
        )
    )
    return figure
