"""A study's picture: every arm's figures seed by seed with their intervals, and its curves, as a small SVG.

Drawn in greys and colours of middle lightness on nothing, so that it reads on a light and on a dark page. The same
result gives the same bytes.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.report import theme
from posttrain.studies.results import Result
from posttrain.studies.study import Curve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_FIGURES, MOST_CURVES = 4, 2  # panels of each kind
POINTS = 120  # of a drawn curve
STYLE: Any = {  # of matplotlib, whose own type lists every key
    "svg.hashsalt": "posttrain",
    "svg.fonttype": "none",  # text stays text: smaller, searchable
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": theme.NEUTRAL,
    "axes.edgecolor": theme.NEUTRAL,
    "axes.labelcolor": theme.NEUTRAL,
    "axes.titlesize": 10,
    "axes.titlecolor": theme.NEUTRAL,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": theme.NEUTRAL,
    "ytick.color": theme.NEUTRAL,
}


def draw(result: Result) -> str:
    """The picture as SVG text: a panel a figure that an expectation names (at most 4), a panel a curve (at most 2)."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    metrics = result.named[:MOST_FIGURES]
    names = list(dict.fromkeys(name for curves in result.curves.values() for name in curves))[:MOST_CURVES]
    heights = [0.5 + 0.3 * len(result.arms)] * len(metrics) + [2.4] * len(names)
    with rc_context(STYLE):
        figure = Figure(figsize=(7.2, sum(heights) + 0.55 * len(heights)), layout="constrained")
        panels = figure.subplots(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        for panel, metric in zip(panels, metrics, strict=False):
            _figure(panel, result, metric)
        for panel, name in zip(panels[len(metrics) :], names, strict=True):
            _curve(panel, result, name)
        target = io.StringIO()
        FigureCanvasSVG(figure).print_svg(target, metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in target.getvalue().splitlines()) + "\n"


def _figure(panel: Axes, result: Result, metric: str) -> None:
    """A row an arm: a dot a seed, a bar for the mean and its interval."""
    for place, found in enumerate(result.arms.values()):
        figure, colour = found.figures.get(metric), theme.stage_colour(place)
        if figure is None:
            continue
        seeds = len(figure.values)
        spread = np.linspace(-0.16, 0.16, seeds) if seeds > 1 else [0.0]
        panel.plot(figure.values, place + np.asarray(spread), "o", color=colour, markersize=4, alpha=0.65, mew=0)
        panel.plot([figure.mean], [place], "|", color=colour, markersize=14, markeredgewidth=2.2)
        if math.isfinite(figure.low) and math.isfinite(figure.high):
            panel.plot([figure.low, figure.high], [place, place], color=colour, linewidth=2.2, solid_capstyle="round")
    panel.set_yticks(range(len(result.arms)), list(result.arms))
    panel.set_ylim(len(result.arms) - 0.5, -0.5)
    panel.tick_params(axis="y", length=0)
    panel.spines["left"].set_visible(False)
    panel.grid(axis="x", color=theme.NEUTRAL, alpha=0.22, linewidth=0.6)
    panel.set_title(f"{metric}: mean with 95 % interval, and every seed", loc="left")


def _curve(panel: Axes, result: Result, name: str) -> None:
    """A line an arm: the mean over its seeds, in the band from the lowest seed to the highest."""
    for place, (arm, curves) in enumerate(result.curves.items()):
        if not curves.get(name):
            continue
        steps, values = together(curves[name])
        colour = theme.stage_colour(place)
        if len(values) > 1:
            panel.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.18, linewidth=0)
        panel.plot(steps, values.mean(0), color=colour, linewidth=1.8, label=arm)
    panel.grid(color=theme.NEUTRAL, alpha=0.22, linewidth=0.6)
    panel.set_xlabel("step")
    panel.set_title(f"{name}: mean over seeds, band from the lowest to the highest", loc="left")
    panel.legend(frameon=False, labelcolor=theme.NEUTRAL, fontsize=8)


def together(curves: Sequence[Curve], key: str = "value") -> tuple[np.ndarray, np.ndarray]:
    """The curves of several seeds at common steps, `[points]` and `[seeds, points]`, as far as all of them go.

    key: what of each point; between the points of a curve it is interpolated.
    """
    all_steps = [[point["step"] for point in curve] for curve in curves]
    end = min(steps[-1] for steps in all_steps)
    grid = np.array(sorted({step for steps in all_steps for step in steps if step <= end}), dtype=float)
    if len(grid) > POINTS:
        grid = grid[np.unique(np.linspace(0, len(grid) - 1, POINTS).round().astype(int))]
    lines = [
        np.interp(grid, steps, [point[key] for point in curve]) for steps, curve in zip(all_steps, curves, strict=True)
    ]
    return grid, np.array(lines)
