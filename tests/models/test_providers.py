"""Providers: a prefix leads to a function by its import path, and to nothing else."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.models import providers
from posttrain.models.providers import PROVIDERS, provided
from posttrain.trajectory import PosttrainError

CALLED: list[str] = []


def make(name: str) -> Path:
    CALLED.append(name)
    return Path(name)


def test_a_prefix_leads_to_its_function(monkeypatch):
    monkeypatch.setitem(PROVIDERS, "mine", f"{__name__}:make")
    monkeypatch.setitem(sys.modules, __name__, sys.modules[make.__module__])
    assert provided("mine:small:1") == Path("small:1")
    assert CALLED == ["small:1"]


@pytest.mark.parametrize("name", ["mine", "other:x", "C:/models/x", "owner/name", "lab"])
def test_other_ids_have_none(name):
    assert provided(name) is None


def test_the_package_names_the_lab_without_importing_it():
    code = (
        "import sys, posttrain; from posttrain.models.providers import PROVIDERS; "
        "assert PROVIDERS['lab'] == 'posttrain.lab:provide'; "
        "assert not any(m.startswith(('posttrain.lab', 'torch')) for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert callable(providers.provided)


def test_load_asks_the_provider(monkeypatch, tmp_path):
    from posttrain.models.load import load

    monkeypatch.setitem(PROVIDERS, "mine", f"{__name__}:make")
    with pytest.raises(PosttrainError, match=r"no \*\.safetensors"):
        load(f"mine:{tmp_path}")
