"""A measurement in a process of its own: its answer, and the memory that it took. Needs only Python, and Linux."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LINES = 20  # of what a process that failed wrote last


class BenchmarkError(Exception):
    """A measurement failed, or the sides did not do the same work."""


def answer(command: Sequence[str], name: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a process printed last, as JSON. name: of the measurement; environment: beside this process's own.

    Raises:
        BenchmarkError: it failed; the message ends with the last lines it wrote.
    """
    given = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **(environment or {})}
    done = subprocess.run(command, cwd=ROOT, env=given, capture_output=True, text=True, check=False)
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-LINES:])
        raise BenchmarkError(f"{name} ended with code {done.returncode}:\n{last}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def high_water() -> float:
    """Bytes of the largest resident set of this program so far (`ru_maxrss` begins with that of the one before it)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return float(line.split()[1]) * 1024
    raise BenchmarkError("/proc/self/status has no VmHWM; this benchmark needs Linux")
