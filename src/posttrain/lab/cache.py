"""What the lab has made once, in the cache."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from posttrain.lab.haste import SUFFIX, in_haste
from posttrain.models.load import cache_folder, writable


def _beside(kept: Callable[..., Path], name: str, last: str, make: Callable[[Path], Path]) -> Path:
    """In haste: the real folder if it is there, else one that nobody else is given."""
    real = cache_folder() / "lab" / name
    return real if (real / last).is_file() else kept(name + SUFFIX, last, make)


@in_haste(_beside)
def kept(name: str, last: str, make: Callable[[Path], Path]) -> Path:
    """The folder of that name in the lab's cache; made on first use, by one process at a time.

    make: writes a folder inside of the scratch folder that it is given, and returns it. last: the file in it that is
    written last, by which a folder that was left half made is known.
    """
    from filelock import FileLock

    folder = cache_folder() / "lab" / name
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
