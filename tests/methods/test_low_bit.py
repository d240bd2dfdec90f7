"""The methods of few bits, as the catalogue makes them, each over a whole tiny model, and what they may be asked."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from conftest import make_tokenizer
from posttrain import load, methods
from posttrain.compress.grids.bilevel import Bilevel
from posttrain.compress.grids.float8 import Float8
from posttrain.compress.grids.power import Power
from posttrain.compress.grids.table import Table
from posttrain.compress.grids.ternary import TernaryPlanes
from posttrain.compress.grids.uniform import Uniform
from posttrain.compress.method import Calibrated, Compression
from posttrain.compress.packed.linear import PackedLinear
from posttrain.compress.packed.weight import from_written, written
from posttrain.compress.pipeline import compress_model
from posttrain.compress.policy import compressed_copy
from posttrain.compress.solvers.dmmv import LeastLargestError
from posttrain.compress.solvers.gptq import GPTQ
from posttrain.compress.solvers.min_max import Search
from posttrain.compress.solvers.ptq161 import SalientAndBinary
from posttrain.compress.solvers.restorative import Restoration
from posttrain.compress.solvers.rtn import RoundToNearest
from posttrain.compress.solvers.spqr import SpQR
from posttrain.trajectory import PosttrainError
from tiny_models import VOCABULARY, make_policy

SMALL: dict[str, Callable[[], Compression]] = {
    "nf4": lambda: methods.nf4(group=16),
    "fp4": lambda: methods.fp4(group=16),
    "fp8": lambda: methods.fp8(),
    "mxfp4": lambda: methods.mxfp4(group=16),
    "nvfp4": lambda: methods.nvfp4(),
    "spqr": lambda: methods.spqr(),
    "billm": lambda: methods.billm(block=16, salient=4),
    "ptqtp": lambda: methods.ptqtp(group=16),
    "ptq1.61": lambda: methods.ptq1_61(epochs=1),
    "dmmv": lambda: methods.dmmv(group=16, moves=8),
    "nupes": lambda: methods.nupes(epochs=1),
}


def batches() -> list[dict[str, torch.Tensor]]:
    draw = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(0, VOCABULARY, (4, 16), generator=draw)} for _ in range(3)]


def model(name: str = "llama") -> torch.nn.Module:
    return make_policy(name, None).model.requires_grad_(False)


def test_tables_have_the_formats_groups_and_scales() -> None:
    assert methods.nf4().solver == RoundToNearest(Table(4, 64, "nf4", "double"))
    assert methods.nf4(double=False).solver == RoundToNearest(Table(4, 64, "nf4", "float"))
    assert methods.fp4().solver == RoundToNearest(Table(4, 64, "fp4", "float"))
    assert methods.mxfp4().solver == RoundToNearest(Table(4, 32, "e2m1", "power"))
    assert methods.nvfp4().solver == RoundToNearest(Table(4, 16, "e2m1", "float8"))
    assert methods.fp8().solver == RoundToNearest(Float8(8, 0, "e4m3"))


def test_the_others_have_the_papers_defaults() -> None:
    assert methods.spqr().solver == SpQR(Bilevel(3, 16, 3, 16), 0.2, 1.0)
    assert methods.ptqtp().solver == RoundToNearest(TernaryPlanes(2, 64, 50, 1e-4))
    made = methods.ptq1_61().solver
    assert isinstance(made, SalientAndBinary)
    assert (made.share, made.grid, made.rate, made.vector_rate) == (pytest.approx(0.2), Uniform(4, 0), 5e-4, 1e-3)
    assert (made.targets, made.rows, made.restoration) == (("float", "prefix"), 1, None)
    assert methods.ptq1_61().calibration == Calibrated(32, 256)
    restoring = methods.ptq1_61(restore=7).solver
    assert isinstance(restoring, SalientAndBinary)
    assert restoring.restoration == Restoration(7, 2, 64, 16, 0.1, 1e-4)
    first = GPTQ(Uniform(4, 128), act_order=True)
    assert methods.dmmv().solver == LeastLargestError(first, 2048, "norm", Search(moves=128))
    assert methods.nupes(epochs=0).solver == RoundToNearest(Power(4, 0))


def test_which_use_data() -> None:
    without = {name for name in SMALL if not SMALL[name]().uses_data}
    assert without == {"nf4", "fp4", "fp8", "mxfp4", "nvfp4", "ptqtp"}
    assert not methods.nupes(epochs=0).uses_data


@pytest.mark.parametrize("name", list(SMALL))
def test_over_a_whole_model(name: str) -> None:
    whole = model()
    with torch.no_grad():
        before = whole(**batches()[0]).logits.log_softmax(-1)
    summary = compress_model(whole, SMALL[name](), batches())
    assert len(summary.layers) == 14
    for layer in summary.layers:
        held = whole.get_submodule(layer.name)
        assert isinstance(held, PackedLinear)
        again = from_written(written(held.weight))
        again.load_state_dict(held.weight.state_dict())
        assert torch.equal(again.dequantize(), held.weight.dequantize())
        assert layer.error < 0.65
    with torch.no_grad():
        after = whole(**batches()[0]).logits.log_softmax(-1)
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    assert 0 < divergence < {"billm": 1.0, "ptq1.61": 1.5}.get(name, 0.2)


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("spqr", "opt"),
        ("billm", "mixtral"),
        ("ptqtp", "opt"),
        ("ptq1.61", "mixtral"),
        ("nupes", "opt"),
        ("dmmv", "opt"),
    ],
)
def test_over_other_architectures(name: str, architecture: str) -> None:
    whole = model(architecture)
    summary = compress_model(whole, SMALL[name](), batches())
    with torch.no_grad():
        assert torch.isfinite(whole(**batches()[0]).logits).all()
    assert all(math.isfinite(layer.error) for layer in summary.layers)


@pytest.mark.parametrize("name", ["nf4", "nvfp4", "spqr", "billm", "ptqtp", "ptq1.61", "nupes"])
def test_a_folder_reads_back_to_the_bit(tmp_path: Path, name: str) -> None:
    small = compressed_copy(make_policy("llama", make_tokenizer()), SMALL[name](), batches())
    again = load(small.save(tmp_path / "small"), precision="fp32")
    with torch.no_grad():
        assert torch.equal(again.model(**batches()[0]).logits, small.model(**batches()[0]).logits)


@pytest.mark.parametrize("name", ["ptq1.61", "dmmv"])
def test_the_same_seed_gives_the_same_model(name: str) -> None:
    found = []
    for _ in range(2):
        whole = model()
        compress_model(whole, SMALL[name](), batches(), seed=3)
        found.append({n: m.weight.dequantize() for n, m in whole.named_modules() if isinstance(m, PackedLinear)})
    assert all(torch.equal(found[0][n], found[1][n]) for n in found[0])


def test_bits_are_counted_whole() -> None:
    weight = torch.randn(576, 576, generator=torch.Generator().manual_seed(0))
    sizes = {"nf4": 4.13, "nvfp4": 4.5, "mxfp4": 4.25, "ptqtp": 3.722, "fp8": 8.056}
    for name, bits in sizes.items():
        solver = methods.find(name).function().solver
        assert isinstance(solver, RoundToNearest)
        assert solver.solve(weight, None, None, "w").bits_per_weight == pytest.approx(bits, abs=0.003), name


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: methods.ptqtp(bits=4), "bits is 4; it counts ternary planes"),
        (lambda: methods.ptq1_61(bits=5), "bits is 5; expected 1 to 4"),
        (lambda: methods.ptq1_61(salient=9), "salient is 9; salient columns have 2 to 8 bits"),
        (lambda: methods.dmmv(start="awq"), "start is 'awq'; expected gptq or rtn"),  # type: ignore[arg-type]
        (lambda: methods.nupes(bits=1), "a power grid has 2 to 8"),
        (lambda: methods.nupes(bits=1, epochs=0), "a power grid has 2 to 8"),
        (lambda: methods.spqr(threshold=-1), "expected a positive share"),
        (lambda: methods.fp8(kind="e3m4"), "expected e4m3 or e5m2"),  # type: ignore[arg-type]
        (lambda: methods.billm(block=1), "expected blocks of 2"),
    ],
)
def test_what_cannot_be_asked(make: Callable[[], Compression], told: str) -> None:
    with pytest.raises(PosttrainError, match=told):
        make()


def test_a_group_that_does_not_divide_is_told_before_anything_is_done() -> None:
    whole = model()
    for made in (methods.ptqtp(group=20), methods.nf4(group=20), methods.spqr(group=20), methods.dmmv(group=20)):
        with pytest.raises(PosttrainError, match="group 20 does not divide the 32 input columns"):
            compress_model(whole, made, batches())
    assert not any(isinstance(m, PackedLinear) for m in whole.modules())
