"""What every self-contained page is made of: its files, the data inside it, and the rule that nothing else runs in it.

Nothing a model or a file says becomes markup or code: text in a page is escaped by jinja2, data lies in JSON blocks
without a `<`, the scripts put it on the page as text only, and the page's content security policy lets no other
script run and nothing load.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

from posttrain.report.folder import number


def render(template: str, scripts: Iterable[str], data: Mapping[str, Any], **context: Any) -> str:
    """A page from the text of a template.

    scripts: the code of the page, after plotly.js. data: by name, what the scripts read, as JSON in the page.
    The template extends `base.html`; it finds `style`, `scripts`, `policy`, every `data` under its name, and `context`.
    """
    import jinja2
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    code = [get_plotlyjs(), *scripts]
    environment = jinja2.Environment(
        loader=jinja2.DictLoader({"base.html": file("base.html")}),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.from_string(template).render(
        style=Markup(file("style.css")),
        scripts=[Markup(script) for script in code],
        policy=_policy(code),
        **{name: Markup(embed(value)) for name, value in data.items()},
        **context,
    )


def embed(value: Any) -> str:
    r"""`value` as JSON for a script block: ASCII, every `<`, `>`, `&` and line separator a `\u` escape, NaN as null."""
    text = json.dumps(finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def finite(value: Any) -> Any:
    """A value of nested mappings and lists with null in the place of every number that JSON lacks."""
    if isinstance(value, float):
        return number(value)
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def _policy(scripts: Iterable[str]) -> str:
    """A content security policy under which exactly `scripts` run and nothing is loaded from anywhere."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


def file(name: str) -> str:
    """A file of this package: a template, style or script."""
    return resources.files("posttrain.report").joinpath(name).read_text(encoding="utf-8")


def write(path: Path, text: str) -> None:
    """Puts `text` at `path` whole: written beside it, forced to the disk, then renamed over it."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", errors="replace") as stream:  # a lone surrogate becomes "?"
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)  # noqa: PTH105 - the documented atomic call
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
