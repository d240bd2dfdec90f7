"""What is written in C and built with the package: which files there are, and what to say where none can be used."""

from __future__ import annotations

from pathlib import Path


def built(folder: Path, name: str) -> list[Path]:
    """The shared libraries of that name beside a module."""
    return sorted(folder.glob(f"{name}*.so"))


def missing(found: list[Path]) -> tuple[str, str]:
    """Why none of these could be used, and what the user can do."""
    if found:
        return f"{found[0].name} is of another version or another machine", "install posttrain again"
    return "no C compiler when it was installed", "install a compiler and posttrain again"
