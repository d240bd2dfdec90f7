"""Durations as people write them."""

from __future__ import annotations

import re

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600}


def in_seconds(text: str) -> float | None:
    """Seconds in `90`, `90s`, `10m` or `1.5h`; None for text that is no duration."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([smh]?)\s*", text)
    return float(found[1]) * _UNITS[found[2]] if found else None
