"""A compression method that is to suit a model, where something was left to it."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from posttrain.compress.method import Compression
from posttrain.compress.pipeline import fitting_group
from posttrain.methods.registry import find


def fitted(
    method: Compression, given: Collection[str], model: nn.Module, skip: Sequence[str] = ()
) -> tuple[Compression, str | None]:
    """The method with a group that divides the model's layers, where its usual one does not; and a sentence that says
    so, or None where it stays as it is.

    method: as its registered function made it. given: the names of the arguments that were set: a group that is among
    them is taken as it is. skip: patterns of layers that stay as they are, beside the method's.
    """
    entry = find(method.name)
    usual = entry.parameters.get("group")
    if "group" in given or not isinstance(usual, int):
        return method, None
    group = fitting_group(model, usual, (*method.skip, *skip))
    if group == usual:
        return method, None
    made: Compression = entry.function(**{**method.arguments, "group": group})
    said = f"{method.name}: its groups of {usual} do not divide all layers; taking {group}"
    return made.replace(calibration=method.calibration), said
