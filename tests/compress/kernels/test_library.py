"""Which kernels run: the environment, a machine without them, inputs that they are not for."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from kernel_levels import assert_product, needs_kernels

from posttrain.compress.kernels import library
from posttrain.compress.kernels.dispatch import FEW, by_panels, few_rows
from posttrain.compress.kernels.library import best_level, forced, offered, runs_on
from posttrain.compress.packed.uniform import UniformWeight
from posttrain.trajectory import PosttrainError


@pytest.fixture
def fresh():
    """Forgets which level was chosen, before and after."""
    best_level.cache_clear()
    yield
    best_level.cache_clear()


def weight() -> UniformWeight:
    torch.manual_seed(0)
    return UniformWeight.of(torch.randint(0, 16, (40, 64)), torch.rand(40, 2), torch.zeros(40, 2), 4, "none")


def test_without_the_library_one_line_and_the_same_product(fresh, monkeypatch):
    monkeypatch.setattr(library, "library", lambda: None)
    monkeypatch.delenv(library.VARIABLE, raising=False)
    w, x = weight(), torch.randn(3, 64)
    with pytest.warns(UserWarning, match="runs without its CPU kernels") as said:
        found = w.product(x)
    assert len(said) == 1
    assert "\n" not in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(w.product(x), found)
    assert_product(found, x, w.dequantize())


def test_off_says_nothing(fresh, monkeypatch):
    monkeypatch.setattr(library, "library", lambda: None)
    monkeypatch.setenv(library.VARIABLE, "off")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weight().product(torch.randn(3, 64))


def test_asked_for_but_not_there(fresh, monkeypatch):
    monkeypatch.setattr(library, "library", lambda: None)
    monkeypatch.setenv(library.VARIABLE, "avx2")
    with pytest.raises(PosttrainError, match="no CPU kernels"):
        best_level()


def test_a_library_of_another_version_is_said_to_be_that(fresh, monkeypatch, tmp_path):
    monkeypatch.delenv(library.VARIABLE, raising=False)
    monkeypatch.setattr(library, "BUILT", (tmp_path, "_native"))
    library.library.cache_clear()
    try:
        with pytest.warns(UserWarning, match="no C compiler when it was installed"):
            assert best_level() == -1
        (tmp_path / "_native.other.so").write_bytes(b"not a library of this machine")
        library.library.cache_clear()
        best_level.cache_clear()
        with pytest.warns(UserWarning, match=r"_native\.other\.so is of another version or another machine.*again"):
            assert best_level() == -1
    finally:
        library.library.cache_clear()


def test_a_misspelt_level(fresh, monkeypatch):
    monkeypatch.setenv(library.VARIABLE, "avx215")
    with pytest.raises(PosttrainError, match="did you mean"):
        best_level()


@needs_kernels
def test_the_environment_sets_the_level(fresh, monkeypatch):
    monkeypatch.setenv(library.VARIABLE, "portable")
    assert library.level() == 0


@needs_kernels
def test_a_level_the_machine_lacks(fresh, monkeypatch):
    monkeypatch.setattr(library, "library", lambda: type("Old", (), {"posttrain_level": staticmethod(lambda: 0)}))
    monkeypatch.setenv(library.VARIABLE, "avx512")
    with pytest.raises(PosttrainError, match="offers portable at most"):
        best_level()
    with pytest.raises(PosttrainError, match="this machine offers portable"), forced("avx2"):
        pass


@needs_kernels
def test_gradients_and_other_types_go_the_way_of_torch():
    x = torch.randn(2, 64)
    assert runs_on(x)
    assert not runs_on(x.double())
    assert not runs_on(x.requires_grad_())
    with torch.no_grad():
        assert runs_on(x)
    weight().product(x).sum().backward()
    assert x.grad is not None
    assert not runs_on(torch.empty(2, 64, device="meta"))


@needs_kernels
def test_many_rows_are_multiplied_by_values():
    w = weight()
    assert few_rows(torch.randn(FEW, 64))
    assert not few_rows(torch.randn(FEW + 1, 64))
    x = torch.randn(FEW + 1, 64)
    assert_product(w.product(x), x, w.dequantize())
    values = w.dequantize()
    assert torch.equal(
        by_panels(x[None], w.shape, lambda rows, room: room.copy_(values[rows])), F.linear(x[None], values)
    )


@needs_kernels
@pytest.mark.parametrize("name", offered())
def test_forced_levels_end(name):
    before = library.level()
    with forced(name):
        assert library.LEVELS[library.level()] == name
    assert library.level() == before
