"""Runs that a test kills: a warm process forks a child for each, so that a start costs no imports.

`python killable.py` reads a JSON line for each run ({"recipe": ..., "folder": ...}), answers with the child's process
id and, when the child has ended, its exit status. `python killable.py --once LINE` carries out one run by itself.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
import time
import traceback
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch

SECONDS_PER_STEP = 0.02  # so that there is something to kill


def reward(completion: str, prompt: Any) -> float:
    """How often the completion holds an `a`, plus a little from each global generator that a user may draw from."""
    noise = random.random() + float(np.random.rand()) + float(torch.rand(()))  # noqa: NPY002
    return completion.count("a") + 0.1 * noise


def carry_out(recipe: dict[str, Any], folder: str) -> None:
    from posttrain.recipe import parse_recipe
    from posttrain.run import execute
    from posttrain.training.collect import Offline, Online

    for source in (Offline, Online):
        _record(source, Path(folder).with_name("taken.jsonl"))
    execute(parse_recipe(recipe), folder=Path(folder), resume=True, show=False)


def _record(source: Any, file: Path) -> None:
    """Write down which rows each step takes, and take a little longer over it."""
    collect = source.collect

    def recorded(self: Any, step: int, progress: Any = None) -> Any:
        time.sleep(SECONDS_PER_STEP)
        rows, take = [], self.sampler.take

        def taking(count: int) -> list[int]:
            rows.extend(taken := take(count))
            return taken

        self.sampler.take = taking
        try:
            found = collect(self, step, progress)
        finally:
            del self.sampler.take
        with file.open("a") as lines:
            lines.write(json.dumps([os.getpid(), type(self).__name__, step, rows]) + "\n")
        return found

    source.collect = recorded


def _child(request: dict[str, Any]) -> None:
    # torch makes its pool of threads anew after a fork, and where several threads are the first to ask for it (those
    # that read weights) some of them get none: one asks here
    torch.set_num_threads(1)
    random.seed()  # as in a fresh process
    np.random.seed()  # noqa: NPY002
    torch.seed()
    try:
        carry_out(**request)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)


def serve() -> None:
    for heavy in ("peft", "scipy.stats", "transformers.models.gpt2.modeling_gpt2"):
        importlib.import_module(heavy)
    import posttrain.run

    vars(posttrain.run)["build"] = lambda folder: folder / "report.html"  # the report is no part of the state
    print("ready", flush=True)
    for line in sys.stdin:
        child = os.fork()
        if not child:
            _child(json.loads(line))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:2] == ["--once"]:
        carry_out(**json.loads(sys.argv[2]))
    else:
        serve()
