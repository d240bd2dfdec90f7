"""Whether values that a user gives are of the types that are asked for, told in words."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticSchemaGenerationError

from posttrain.trajectory import PosttrainError

SEEDS = 1 << 32  # from 0 to below it


def checked_seed(value: Any, name: str = "seed") -> int:
    """A seed, if it is one that every generator takes. name: what the user calls it."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < SEEDS:
        raise PosttrainError(f"{name} is {value!r}; expected a whole number from 0 to {SEEDS - 1}")
    return value


def check_types(function: Callable[..., Any], given: Mapping[str, Any], name: str) -> None:
    """PosttrainError for an argument of another type than the function says, where that is a type that YAML has.

    Numbers of NumPy are numbers; of choices the function itself says which there are. name: what the user calls it.
    """
    try:
        hints = get_type_hints(function)
    except NameError:  # of a type that its module imports for type checkers alone
        return
    for key, value in given.items():
        hint = hints.get(key, Any)
        kinds = in_yaml(hint)
        if len(kinds) < len(alternatives(hint)) or any(get_origin(kind) is Literal for kind in kinds):
            continue
        if isinstance(value, numbers.Real) and not isinstance(value, bool):
            value = int(value) if isinstance(value, numbers.Integral) else float(value)
        try:
            of_kind(kinds, tuple(value) if isinstance(value, list) else value)
        except ValueError as error:
            raise PosttrainError(f"{name}: {key} is {value!r}; {error}") from None


def alternatives(hint: Any) -> tuple[Any, ...]:
    """The types that a hint joins."""
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def in_yaml(hint: Any) -> list[Any]:
    """Those among the types of a hint whose values YAML can say: its own, not objects such as a loaded policy."""
    return [kind for kind in alternatives(hint) if _adapter(kind) is not None]


def of_kind(kinds: Sequence[Any], value: Any) -> Any:
    """The value, which must already be of one of the types (a whole number will do for a fraction); ValueError says in
    words what it is not.
    """
    adapter = _adapter(Union[tuple(kinds)])  # noqa: UP007 (made at run time)
    assert adapter is not None
    try:
        return adapter.validate_python(value, strict=True)
    except ValidationError as error:
        raise ValueError(reason(error)) from None


def reason(error: ValidationError) -> str:
    """The first of what was found wrong, to go on a sentence with."""
    message = str(error.errors()[0]["msg"])
    return message[0].lower() + message[1:]


@functools.cache
def _adapter(kind: Any) -> TypeAdapter[Any] | None:
    try:
        return TypeAdapter(kind)
    except PydanticSchemaGenerationError:
        return None
