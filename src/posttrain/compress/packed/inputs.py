"""What is done to the inputs of a packed layer before they are multiplied: a chain of steps."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from posttrain.reward.names import unknown

KINDS: dict[str, type[InputStep]] = {}


class InputStep(nn.Module, ABC):
    """A function of `[..., in]` inputs that keeps their shape and dtype: a quantizer, a rotation, a scale.

    width: in. Its tensors are buffers; `empty(width, **settings())` makes one that waits for `load_state_dict`.
    """

    kind: ClassVar[str]

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = int(width)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "kind" in cls.__dict__:
            KINDS[cls.kind] = cls

    @abstractmethod
    def forward(self, inputs: Tensor) -> Tensor: ...

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> InputStep:
        """Goes along to another device, but not to another precision, as a packed weight."""

        def moved(tensor: Tensor) -> Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        return super()._apply(moved, recurse)

    def settings(self) -> dict[str, Any]:
        """JSON values: the arguments of `empty` beside the width."""
        return {}

    @classmethod
    def empty(cls, width: int, **settings: Any) -> InputStep:
        return cls(width, **settings)


def chain(steps: Sequence[InputStep | None]) -> nn.Sequential | None:
    """Steps one after the other; None where there are none."""
    there = [step for step in steps if step is not None]
    return nn.Sequential(*there) if there else None


def written(steps: nn.Sequential | None) -> list[dict[str, Any]]:
    """A chain as JSON values; `from_written` is its inverse."""
    return [{"kind": s.kind, "width": s.width, **s.settings()} for s in steps or () if isinstance(s, InputStep)]


def from_written(described: Sequence[dict[str, Any]]) -> nn.Sequential | None:
    """An empty chain of a description, ready for `load_state_dict`."""
    made = []
    for each in described:
        settings = dict(each)
        kind, width = settings.pop("kind"), settings.pop("width")
        if kind not in KINDS:
            raise unknown("step before a packed layer", kind, KINDS)
        made.append(KINDS[kind].empty(width, **settings))
    return chain(made)
