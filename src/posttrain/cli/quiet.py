"""Keeping libraries quiet on standard error: no progress bars and advice of theirs beside ours, real errors stay; and
warnings of posttrain's own in a line each, as its errors are.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path
from typing import TextIO

ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "DATASETS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}
LIBRARIES = ("transformers", "datasets", "huggingface_hub", "peft", "accelerate", "torch")
PACKAGE = Path(__file__).parents[1]
_plain = warnings.showwarning


def quiet() -> None:
    """Silence the libraries that are imported later, by their environment, and those that are there already.

    What the user has set in the environment stays as it is. Nothing is imported here.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for library in LIBRARIES:
        warnings.filterwarnings("ignore", module=rf"{library}(\.|$)")
        logging.getLogger(library).setLevel(logging.ERROR)
    for library in ("transformers.utils.logging", "datasets.utils.logging"):
        if library in sys.modules:
            sys.modules[library].disable_progress_bar()
    warnings.showwarning = brief


def brief(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
    line: str | None = None,
) -> None:  # fmt: skip
    """Show a warning: one of posttrain's own in one line, without the place in its source."""
    if file is not None or PACKAGE not in Path(filename).parents:
        return _plain(message, category, filename, lineno, file, line)
    from posttrain.terminal import one_line

    print(f"posttrain: warning: {one_line(str(message))}", file=sys.stderr, flush=True)
