"""Writing a model as a plain `transformers` folder, from whichever process calls."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def save_model(model: Any, folder: str | Path) -> None:
    """Weights (safetensors) and configurations of a `transformers` model, written by the process that calls this.

    `save_pretrained` by itself writes nothing in any but the first of several processes that train together, and says
    nothing of it: a model that is made for the cache would be an empty folder. It also refuses a temperature without
    sampling in older versions, as some published models have it.
    """
    with _by_this_process(model):
        try:
            model.save_pretrained(folder, safe_serialization=True)
        except ValueError:
            generation = getattr(model, "generation_config", None)
            if generation is None or generation.do_sample:
                raise
            before, generation.do_sample = generation.do_sample, True
            try:
                model.save_pretrained(folder, safe_serialization=True)
            finally:
                generation.do_sample = before
    open_as_the_rest(Path(folder))


def open_as_the_rest(folder: Path) -> None:
    """Let who may read a folder's configuration read its weights: safetensors writes files for their owner alone."""
    for weights in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", weights)


@contextmanager
def _by_this_process(model: Any) -> Iterator[None]:
    """The model's own answer to which process writes (transformers 5) is "this one" inside the block."""
    model.should_save_on_this_rank = lambda is_main_process: is_main_process
    try:
        yield
    finally:
        del model.should_save_on_this_rank
