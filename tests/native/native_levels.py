"""Tests of the functions in C at every level of them that the processor offers."""

from __future__ import annotations

import functools

import pytest

from posttrain.native import library


@pytest.fixture(params=library.LEVELS)
def each_level(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    found = library.library()
    if found is None:
        pytest.skip("posttrain was built without its C functions")
    if library.LEVELS.index(request.param) > int(found.posttrain_fused_level()):
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setattr(library, "level", functools.cache(lambda: request.param))
    return str(request.param)
