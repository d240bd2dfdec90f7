"""The option `--task` of the commands that also know the tasks of the lab's models."""

from __future__ import annotations

from typing import TYPE_CHECKING

from posttrain.cli.inline import inline

if TYPE_CHECKING:
    from posttrain.evaluation.task import Task

LAB = "lab:"


def task_option(text: str | None, model: str) -> Task | None:
    """The task that was asked for; else a lab model's own, and None for another model."""
    from posttrain.evaluation.tasks import task_from

    if text is not None:
        return task_from(inline("--task", text))
    if not model.startswith(LAB):
        return None
    from posttrain import lab

    return lab.task(model.removeprefix(LAB).partition("@")[0])
