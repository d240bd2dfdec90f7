"""One measurement, in a process of its own: reads a task from the command line, prints its answer as one JSON line."""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import warnings
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

from benchmarks.measurement import Measurement, Step, Task
from benchmarks.roofline import matrix_throughput
from benchmarks.workload import CASES


def measure(task: Task) -> Measurement:
    """Run a training task of either side and keep its timed steps."""
    import torch
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    case, total = CASES[task.case], task.warmup + task.steps
    if task.side == "ours":
        from benchmarks import ours

        steps, first_loss, about = ours.run(case, total, task.model)
    else:
        from datasets.utils import disable_progress_bars

        from benchmarks import peer

        disable_progress_bars()
        assert task.arm is not None
        with tempfile.TemporaryDirectory() as scratch:
            steps, first_loss = peer.run(case, total, model_folder(task.model), task.arm, Path(scratch))
        about = {}
    if len(steps) != total:
        raise RuntimeError(f"{task.side} {task.case} finished {len(steps)} steps of {total}")
    return Measurement(
        seconds=_seconds(steps, task.warmup),
        groups=[s.groups for s in steps[task.warmup :]],
        rewards=[s.rewards for s in steps[task.warmup :]],
        first_loss=first_loss,
        peak_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        threads=torch.get_num_threads(),
        about=about,
    )


def model_folder(model: str) -> Path:
    """The folder both sides load: a bundled model's cached one (fetched where it is missing), or the path given."""
    from posttrain.models.load import BUNDLED, bundled_folder

    folder = bundled_folder(model) if model in BUNDLED else Path(model)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{model} is no bundled model ({', '.join(BUNDLED)}) and no folder with a config.json")
    return folder


def _seconds(steps: list[Step], warmup: int) -> list[float]:
    """Duration of each timed step: from the end of the one before, data loading and rollouts included."""
    ended = [s.ended for s in steps[warmup - 1 :]]
    return [after - before for before, after in pairwise(ended)]


def main() -> None:
    task = Task.parse(sys.argv[1])
    warnings.simplefilter("ignore")
    answer: object
    if task.side == "matrix":
        answer = matrix_throughput()
    elif task.side == "model":
        answer = {"model": model_folder(task.model).name}
    else:
        answer = asdict(measure(task))
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
