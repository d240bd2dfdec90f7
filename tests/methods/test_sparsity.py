"""The methods of sparsity, as the catalogue makes them, each over a whole tiny model, through a folder and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import make_tokenizer
from posttrain import load, methods
from posttrain.compress.method import Compression
from posttrain.compress.packed.linear import PackedLinear
from posttrain.compress.packed.sparse import NMWeight, SparseWeight
from posttrain.compress.pipeline import compress_model
from posttrain.compress.policy import compressed_copy
from posttrain.compress.solvers.magnitude import Magnitude
from posttrain.compress.solvers.sparsegpt import SparseGPT
from posttrain.compress.solvers.sparsity import Sparsity
from posttrain.compress.solvers.wanda import Wanda
from posttrain.recipe_text import read_yaml
from posttrain.trajectory import PosttrainError
from tiny_models import VOCABULARY, make_policy

SMALL: dict[str, Callable[..., Compression]] = {
    "magnitude": methods.magnitude,
    "wanda": methods.wanda,
    "sparsegpt": methods.sparsegpt,
}


def batches() -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, VOCABULARY, (4, 16), generator=draw)} for _ in range(3)]


def test_they_have_the_papers_defaults() -> None:
    assert methods.magnitude().solver == Magnitude(Sparsity(0.5), "layer")
    assert methods.wanda().solver == Wanda(Sparsity(0.5), "row", sequential=False)
    assert methods.sparsegpt().solver == SparseGPT(Sparsity(0.5), 0.01, 128)
    assert methods.wanda(pattern="1:4").solver == Wanda(Sparsity(0.75, "1:4"))
    assert [SMALL[name]().uses_data for name in SMALL] == [False, True, True]


@pytest.mark.parametrize("name", list(SMALL))
@pytest.mark.parametrize(("pattern", "kind"), [("", SparseWeight), ("2:4", NMWeight)])
def test_over_a_whole_model(name: str, pattern: str, kind: type) -> None:
    whole = make_policy("llama", None).model.requires_grad_(False)
    summary = compress_model(whole, SMALL[name](pattern=pattern), batches())
    assert len(summary.layers) == 14
    for layer in summary.layers:
        held = whole.get_submodule(layer.name)
        assert isinstance(held, PackedLinear)
        assert isinstance(held.weight, kind)
        assert float((held.weight.dequantize() == 0).float().mean()) == pytest.approx(0.5, abs=1e-3)
        assert layer.bits == pytest.approx(9.0, rel=1e-3)
    assert summary.bits == pytest.approx(9.0, rel=1e-3)


@pytest.mark.parametrize(("name", "architecture"), [("wanda", "opt"), ("sparsegpt", "mixtral"), ("wanda", "gpt-neox")])
def test_over_other_architectures(name: str, architecture: str) -> None:
    whole = make_policy(architecture, None).model.requires_grad_(False)
    summary = compress_model(whole, SMALL[name](), batches())
    with torch.no_grad():
        assert torch.isfinite(whole(**batches()[0]).logits).all()
    assert all(math.isfinite(layer.error) for layer in summary.layers)


@pytest.mark.parametrize("pattern", ["", "2:4"])
def test_a_folder_reads_back_to_the_bit(tmp_path: Path, pattern: str) -> None:
    policy = make_policy("llama", make_tokenizer())
    small = compressed_copy(policy, methods.wanda(pattern=pattern), batches())
    small.save(tmp_path / "small")
    again = load(str(tmp_path / "small"))
    with torch.no_grad():
        expected = small.model(**batches()[0]).logits
        assert torch.equal(again.model(**batches()[0]).logits, expected)


def test_half_precision_models_keep_what_stays_exactly() -> None:
    whole = make_policy("llama", None).model.requires_grad_(False).bfloat16()
    before = {n: p.detach().float() for n, p in whole.named_parameters()}
    compress_model(whole, methods.magnitude(0.3), batches())
    for name, module in whole.named_modules():
        if isinstance(module, PackedLinear):
            held = module.weight.dequantize()
            assert torch.equal(held[held != 0], before[f"{name}.weight"][held != 0])


def test_what_does_not_divide_is_told_before_anything_is_done() -> None:
    whole = make_policy("llama", None).model.requires_grad_(False)
    for make in SMALL.values():
        with pytest.raises(PosttrainError, match="input columns, which 5:64 does not divide"):
            compress_model(whole, make(pattern="5:64"), batches())
    assert not any(isinstance(m, PackedLinear) for m in whole.modules())


def test_a_pattern_in_yaml_is_no_number_in_base_sixty() -> None:
    found, _ = read_yaml("wanda: {pattern: 2:4, sparsity: 0.5, 4:8: 1e-3}", "recipe")
    assert found == {"wanda": {"pattern": "2:4", "sparsity": 0.5, "4:8": 1e-3}}
