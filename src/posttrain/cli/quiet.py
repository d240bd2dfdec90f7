"""Keeping libraries quiet on standard error: no progress bars and advice of theirs beside ours, real errors stay."""

from __future__ import annotations

import logging
import os
import sys
import warnings

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
