"""Types and seeds that users give: what passes, and in which words the rest is refused."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest

from posttrain.training.values import alternatives, check_types, checked_seed, in_yaml, of_kind
from posttrain.trajectory import PosttrainError


def made(bits: int = 4, rate: float = 0.1, clip: Literal["none", "mse"] = "none", policy: object | None = None) -> None:
    """As a method function is."""


class Policy: ...


@pytest.mark.parametrize(
    "given",
    [
        {"bits": 3, "rate": 1, "clip": "mse"},
        {"bits": np.int64(3), "rate": np.float32(0.5)},
        {"policy": Policy()},
        {"clip": "most"},  # which the function refuses in its own words
    ],
)
def test_what_passes(given: dict[str, Any]) -> None:
    check_types(made, given, "made")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"bits": 2.5}, "made: bits is 2.5; input should be a valid integer"),
        ({"bits": None}, "made: bits is None; input should be a valid integer"),
        ({"bits": True}, "made: bits is True; input should be a valid integer"),
        ({"rate": "half"}, "made: rate is 'half'; input should be a valid number"),
    ],
)
def test_what_is_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(PosttrainError) as raised:
        check_types(made, given, "made")
    assert str(raised.value) == told


def test_the_types_that_yaml_has() -> None:
    assert alternatives(int | Policy | None) == (int, Policy, type(None))
    assert in_yaml(int | Policy | None) == [int, type(None)]
    assert of_kind([int, type(None)], 3) == 3
    with pytest.raises(ValueError, match="valid integer"):
        of_kind([int], "3")


def test_seeds_that_every_generator_takes() -> None:
    assert checked_seed(0) == 0
    assert checked_seed((1 << 32) - 1) == (1 << 32) - 1
    for wrong in (-1, 1 << 32, True, 1.0, "1"):
        with pytest.raises(PosttrainError, match=r"--seed is .*; expected a whole number from 0 to 4294967295"):
            checked_seed(wrong, "--seed")
