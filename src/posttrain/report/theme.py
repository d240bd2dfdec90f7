"""How the figures look: colours and a layout that stay legible on a light, a dark and a printed page."""

from __future__ import annotations

import html
from typing import Any

NEUTRAL = "#8a929c"  # about 3:1 against both page backgrounds, for axes and for what is no stage
GRID = "rgba(138, 146, 156, 0.22)"
HOVER = "#2b3138"  # a dark box on either page
STAGES = ("#3f7fc1", "#d9772b", "#2f9a6c", "#a860a8", "#b39220", "#2f9aaa", "#c9596a")
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'


def stage_colour(position: int) -> str:
    """The colour of the stage at `position` in the run; a negative position is before all of them."""
    return NEUTRAL if position < 0 else STAGES[position % len(STAGES)]


def label(text: str) -> str:
    """`text` for a figure, where plotly would otherwise take tags (a link, bold) out of it."""
    return html.escape(text, quote=False)


def axis(**settings: Any) -> dict[str, Any]:
    """An axis in grey: a quiet grid, no frame."""
    return {
        "gridcolor": GRID,
        "linecolor": NEUTRAL,
        "zerolinecolor": GRID,
        "tickfont": {"color": NEUTRAL, "size": 11},
        "automargin": True,
        "showspikes": False,  # plotly draws them with a white edge
        **settings,
    }


def layout(**settings: Any) -> dict[str, Any]:
    """The layout that all figures share."""
    return {
        "template": "none",
        "paper_bgcolor": "rgba(0, 0, 0, 0)",
        "plot_bgcolor": "rgba(0, 0, 0, 0)",
        "font": {"family": FONT, "color": NEUTRAL, "size": 12},
        "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
        "hoverlabel": {"bgcolor": HOVER, "bordercolor": HOVER, "font": {"color": "#f2f4f6", "family": FONT}},
        "showlegend": False,
        **settings,
    }
