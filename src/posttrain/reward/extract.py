"""Finding the final answer inside a completion: by the markers models are trained to write, or as the last number."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

_ANSWER_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_MARKERS = (
    re.compile(r"(?:\banswer\b\**\s*:\**|####)", re.IGNORECASE),
    re.compile(r"\banswer\s+is\b:?", re.IGNORECASE),
)
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9])\$?[-+−]?\$?(?:\d{1,3}(?:,\d{3})+(?![0-9])|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?"  # 1,234.5
    r"|(?<![A-Za-z0-9.])\$?[-+−]?\$?\.\d+"  # .5
)


def find_answer(text: str) -> str | None:
    r"""The answer that `text` marks as final, stripped; None where nothing marks one.

    In this order: the last `<answer>...</answer>`, the last `\boxed{...}` (nested braces counted), what follows the
    last "Answer:" or "####", what follows the last "answer is". After such a marker the answer is the rest of its line,
    or where that is empty the lines below it (bold markup removed).
    """
    tags = _ANSWER_TAG.findall(text)
    if tags:
        return str(tags[-1]).strip()
    boxed = _last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    for pattern in _MARKERS:
        markers = list(pattern.finditer(text))
        if markers:
            line, _, below = text[markers[-1].end() :].partition("\n")
            answer = line.strip() or below.strip()
            return answer[2:-2].strip() if answer.startswith("**") and answer.endswith("**") else answer
    return None


def extract_answer(text: str) -> str:
    """`find_answer(text)`, or the whole text stripped where no answer is marked."""
    marked = find_answer(text)
    return text.strip() if marked is None else marked


def last_number(text: str) -> str | None:
    """The last number in `text` without thousands commas or currency sign ("1,234.50" gives "1234.50"), or None."""
    numbers = _NUMBER.findall(text)
    return numbers[-1].translate(_PLAIN) if numbers else None


def as_number(text: str) -> Decimal | None:
    """The exact value of a text that is one plain number ("+1,000.0", "$5", "3e2"), None where it is anything else."""
    text = text.strip()
    if not _NUMBER.fullmatch(text):
        return None
    try:
        return Decimal(text.translate(_PLAIN))
    except InvalidOperation:
        return None


_PLAIN = str.maketrans({",": None, "$": None, "−": "-"})


def _last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` whose braces balance."""
    start = text.rfind(r"\boxed{")
    while start >= 0:
        open_braces = 0
        for position in range(start + len(r"\boxed"), len(text)):
            open_braces += {"{": 1, "}": -1}.get(text[position], 0)
            if open_braces == 0:
                return text[start + len(r"\boxed{") : position]
        start = text.rfind(r"\boxed{", 0, start)
    return None
