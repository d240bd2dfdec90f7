"""What a failed call of a reward is: its kind, and what happened in one line."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from typing import Literal

# an exception or no finite number, no answer in time, the end of its process, more memory than allowed
FaultKind = Literal["raised", "timeout", "crash", "memory"]


@dataclass(frozen=True, slots=True)
class Fault:
    """A call that gave no number. message: one line that a person can act on."""

    kind: FaultKind
    message: str

    @classmethod
    def of(cls, error: Exception) -> Fault:
        """The fault that an exception is; torch says with a RuntimeError that there is no memory."""
        short = isinstance(error, MemoryError) or "can't allocate memory" in str(error)
        return cls("memory" if short else "raised", f"{type(error).__name__}: {error}")


def ending(code: int) -> str:
    """How a process ended, from its exit status (`-N` where signal N ended it), in words."""
    if code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"{name}: out of memory, perhaps" if name == "SIGKILL" else name
