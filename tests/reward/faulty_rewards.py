"""Rewards that do what a completion says: hang, crash, eat memory. Called in processes of their own alone."""

from __future__ import annotations

import ctypes
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

LEFT: list[bytearray] = []


def obey(completion: str, prompt: Any, *, tokens: int = 0, finish: str = "none") -> float:
    """What the first word of the completion says."""
    word, _, rest = completion.partition(" ")
    match word:
        case "hang":
            time.sleep(1_000)
        case "spin":
            while True:
                pass
        case "hang-with-child":  # a process of its own, which writes its number down
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
            Path(rest).write_text(str(child.pid))
            child.wait()
        case "exit":
            os._exit(int(rest))
        case "sys-exit":
            sys.exit(int(rest))
        case "segfault":
            ctypes.string_at(0)
        case "kill":
            os.kill(os.getpid(), 9)
        case "eat":
            return float(len(bytearray(int(rest))))
        case "eat-tensor":
            return float(torch.zeros(int(rest), dtype=torch.uint8).numel())
        case "leak":  # a little more with each call
            LEFT.append(bytearray(int(rest)))
        case "raise":
            raise ValueError(rest)
        case "nan":
            return float("nan")
        case "write":  # over everything that is open: the pipe to the warden too
            for descriptor in range(3, 64):
                try:
                    os.write(descriptor, b"\x00\x00\x00\x02{]")
                except OSError:
                    continue
        case "print":
            print(rest)
        case "random":
            return random.random() + float(np.random.rand()) + float(torch.rand(()))  # noqa: NPY002
        case "pid":
            return float(os.getpid())
        case "answer":
            return float(prompt.answer) + tokens + 0.5 * (finish == "stop")
    return float(len(completion))


def slow(completion: str, prompt: Any) -> float:
    time.sleep(0.2)
    return 1.0


class Scaled:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, completion: str, prompt: Any) -> float:
        return self.factor * len(completion)
