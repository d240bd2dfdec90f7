"""Answering a misspelt name with the nearest known ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from posttrain.trajectory import PosttrainError


def unknown(kind: str, name: object, known: Iterable[str], where: str = "") -> PosttrainError:
    """The error for a `name` that is none of the `known` ones: it names the nearest, or lists all of a short list.

    kind: what the name was taken for ("verifier", "setting of chain_sum"); where: what else could have been meant.
    """
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(close)}?" if close else ""
    listing = f" (known: {', '.join(names)})" if len(names) <= 40 or not close else ""
    return PosttrainError(f"unknown {kind} {str(name)!r}{hint}{listing}{where}")
