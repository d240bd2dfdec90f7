"""Options that take what a recipe may hold in one place: a name, a file, or a mapping in YAML."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def inline(option: str, text: str) -> Any:
    """`chain_sum` and `rows.jsonl` as they are; `{reasoning_gym: chain_sum}` and what a .yaml file holds as a mapping.

    option: what it was given to, for messages.
    """
    from posttrain.recipe_text import read_yaml
    from posttrain.trajectory import PosttrainError

    name = option
    if Path(text).suffix in (".yaml", ".yml"):
        name = text
        try:
            text = Path(text).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise PosttrainError(f"{option}: cannot read {name}: {error}") from None
    elif not text.lstrip().startswith("{") and ": " not in text:
        return text
    values, _ = read_yaml(text, name)
    if not isinstance(values, Mapping):
        raise PosttrainError(f"{name}: got {values!r}; expected a mapping such as {{reasoning_gym: chain_sum}}")
    return values
