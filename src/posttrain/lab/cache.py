"""What the lab has made once, in the cache."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from posttrain.lab.haste import SUFFIX, is_hasty
from posttrain.models.load import cache_folder, writable


def kept(name: str, last: str, make: Callable[[Path], Path]) -> Path:
    """The folder of that name in the lab's cache; made on first use, by one process at a time.

    make: writes a folder inside of the scratch folder that it is given, and returns it. last: the file in it that is
    written last, by which a folder that was left half made is known. Where haste is asked for (see `haste`) and the
    real folder is not there, it is another folder, which nobody else is given.
    """
    from filelock import FileLock

    folder = cache_folder() / "lab" / name
    if is_hasty() and not (folder / last).is_file():
        folder = folder.with_name(name + SUFFIX)
    if (folder / last).is_file():
        return folder
    writable(folder.parent)
    with FileLock(str(folder) + ".lock"):
        if (folder / last).is_file():
            return folder
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = make(Path(scratch))
            shutil.rmtree(folder, ignore_errors=True)  # what a killed process left without its last file
            made.rename(folder)
    return folder
