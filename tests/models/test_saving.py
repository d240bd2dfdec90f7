"""Folders of models are as readable as everything else that their writer writes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from conftest import make_model, make_tokenizer
from posttrain import methods, quantize
from posttrain.models.causal import CausalPolicy


@pytest.mark.parametrize("umask", [0o022, 0o077])
@pytest.mark.parametrize("packed", [False, True])
def test_weights_are_as_readable_as_the_configuration(tmp_path: Path, umask: int, packed: bool) -> None:
    policy = CausalPolicy(make_model(0), make_tokenizer(), "tiny")
    if packed:
        policy = quantize(policy, methods.rtn(bits=4, group=8), ["some text to look at"] * 8, show=False)
    before = os.umask(umask)
    try:
        folder = policy.save(tmp_path / "saved")
    finally:
        os.umask(before)
    modes = {file.stat().st_mode & 0o777 for file in folder.iterdir()}
    assert modes == {0o666 & ~umask}
