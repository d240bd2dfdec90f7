"""Products of fewer bits, as the catalogue makes them: in their limits, over whole models, in a recipe."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from block_models import batches_of, logits, model_of
from conftest import make_tokenizer
from posttrain import load, methods
from posttrain.compress.activations.dynamic import Dynamic
from posttrain.compress.grids.restricted import Restricted
from posttrain.compress.method import Compression
from posttrain.compress.packed.bits import unpack
from posttrain.compress.packed.linear import PackedLinear
from posttrain.compress.packed.table import TableWeight
from posttrain.compress.pipeline import compress_model
from posttrain.compress.policy import compressed_copy
from posttrain.compress.solvers.rtn import RoundToNearest
from posttrain.models.float_format import FloatFormat
from posttrain.models.simulated import SimulatedPrecision
from posttrain.recipe import parse_recipe
from posttrain.training.method import Method
from tiny_models import make_policy

PLAIN = RoundToNearest(Restricted(8, 0))


def compressed(name: str, method: Compression) -> torch.Tensor:
    made = copy.deepcopy(model_of(name))
    compress_model(made, method, batches_of(made))
    return logits(made)


@pytest.mark.limit("llm-int8")
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_llm_int8_that_rounds_no_input_is_weights_to_nearest(name: str) -> None:
    assert torch.equal(compressed(name, methods.llm_int8(0.0)), compressed(name, Compression("rtn", PLAIN)))


@pytest.mark.limit("llm-int8")
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_llm_int8_without_outliers_is_eight_bits_by_the_token(name: str) -> None:
    plain = Compression("w8a8", PLAIN, activations=Dynamic(8))
    assert torch.equal(compressed(name, methods.llm_int8(math.inf)), compressed(name, plain))
    assert not torch.equal(compressed(name, methods.llm_int8(math.inf)), compressed(name, methods.llm_int8(0.1)))


def test_llm_int8_needs_no_data_and_reads_back_from_a_folder(tmp_path: Path) -> None:
    assert not methods.llm_int8().uses_data
    policy = make_policy("llama", make_tokenizer())
    batches = [{"input_ids": torch.arange(8)[None]}]
    small = compressed_copy(policy, methods.llm_int8(1.0), batches)
    small.save(tmp_path / "small")
    again = load(str(tmp_path / "small"))
    with torch.no_grad():
        assert torch.equal(again.model(**batches[0]).logits, small.model(**batches[0]).logits)
    assert small.compression.bits == pytest.approx(8 + 16 / 32, rel=0.1)


@pytest.mark.parametrize("make", [methods.nf4, methods.fp4])
def test_double_quantization_moves_weights_by_less_than_a_percent(make: Callable[..., Compression]) -> None:
    """Card 136's exact check, of weights that keep their codes; codes are found with the scales as they are stored."""
    made = [copy.deepcopy(model_of("llama")) for _ in range(2)]
    for model, double in zip(made, (False, True), strict=True):
        compress_model(model, make(group=16, double=double), batches_of(model))
    for (name, one), (_, two) in zip(*(m.named_modules() for m in made), strict=True):
        if isinstance(one, PackedLinear) and isinstance(two, PackedLinear):
            first, second = one.weight, two.weight
            assert isinstance(first, TableWeight)
            assert isinstance(second, TableWeight)
            same = unpack(first.codes, 4, first.shape[1]) == unpack(second.codes, 4, first.shape[1])
            assert float(same.float().mean()) > 0.97
            before, after = first.dequantize()[same], second.dequantize()[same]
            assert 0 < float((before - after).norm() / before.norm()) < 0.01, name


def test_reduced_precision_in_a_recipe() -> None:
    recipe = parse_recipe({
        "model": "smollm2-135m",
        "stages": [{"reduced-precision": {
            "data": [{"prompt": "1+1", "completion": "2"}] * 4,
            "exponent": 5, "mantissa": 2, "rounding": "nearest", "learning_rate": 0.1,
        }}],
    })  # fmt: skip
    (stage,) = recipe.stages
    assert isinstance(stage.method, Method)
    assert stage.method.precision == SimulatedPrecision(FloatFormat(5, 2, beyond="largest"))
    assert stage.method.settings.learning_rate == 0.1
    assert methods.sft().precision is None
